"""Peak memory and time of loss and backward at the head: chunked scoring against logits held whole.

    python benchmarks/loss_memory/run.py [--tokens 2048 --hidden 576 --vocabulary 49152]

Each side runs in a process of its own; the peak is the process's resident memory at its highest, less what it held before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import print_machine
from torch import nn

from tunesmith.engines.single import keep_freed_memory
from tunesmith.models.head import Head, Targets, score_targets
from tunesmith.types import Wanted


def measure(side: str, trained: bool, tokens: int, hidden: int, vocabulary: int) -> dict[str, float]:
    """Peak bytes over the start and median seconds of three passes."""
    linear = nn.Linear(hidden, vocabulary, bias=False).requires_grad_(trained)
    states, target = torch.randn(tokens, hidden, requires_grad=True), torch.randint(0, vocabulary, (tokens,))
    if trained:
        linear.weight.grad = torch.zeros_like(linear.weight)  # both sides hold the gradient that they accumulate into
    keep_freed_memory()  # as in a run, for both sides
    before, seconds = peak_bytes(), []
    for _ in range(3):
        start = perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            if side == "chunked":
                wanted = Wanted(is_likelihood=True)
                loss = -score_targets(states, Head(linear), Targets(target, wanted))[0].sum() / tokens
            else:
                loss = nn.functional.cross_entropy(linear(states).float(), target)
        loss.backward()
        seconds.append(perf_counter() - start)
    return {"bytes": peak_bytes() - before, "seconds": median(seconds), "loss": float(loss.detach())}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = (args.tokens, args.hidden, args.vocabulary)
    if args.side:
        torch.manual_seed(0)
        print(json.dumps(measure(args.side[0], args.side[1] == "trained", *shape)))
        return
    print_machine()
    print(f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocabulary}: loss and backward at the head")
    for head in ("frozen", "trained"):
        results = {}
        for side in ("naive", "chunked"):
            words = [f"--{name}={value}" for name, value in zip(("tokens", "hidden", "vocabulary"), shape, strict=True)]
            command = [sys.executable, __file__, *words, "--side", side, head]
            results[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for side, found in results.items():
            print(f"  {head:7} head  {side:7}  peak {found['bytes'] / 2**20:7.0f} MiB  {found['seconds']:.3f} s")
        memory, time = (results["naive"][key] / results["chunked"][key] for key in ("bytes", "seconds"))
        print(f"  {head:7} head  naive / chunked: memory {memory:.1f} ×, time {time:.2f} ×")


if __name__ == "__main__":
    main()
