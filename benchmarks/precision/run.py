"""Tokens per second of a LoRA and a full step of SmolLM2-135M in each precision, and what `auto` takes here.

python benchmarks/precision/run.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import in_turn, median, print_machine

from tunesmith.config_file import config_from_dict
from tunesmith.engines.single import find_precision
from tunesmith.run import build

BATCH_SIZE = 16


def step(method: str, precision: str, pack: bool) -> tuple[Callable[[], None], int]:
    """One step on the same demo samples, and how many tokens they have."""
    tree = {
        "model": {"path": "demo", "precision": precision}, "data": {"path": "demo", "pack": pack}, "method": method,
        "train": {"batch_size": BATCH_SIZE}, "output": "unused", "engine": {"name": "single", "device": "cpu"},
    }  # fmt: skip
    run = build(config_from_dict(tree))
    batch = run.data(0)

    def once() -> None:
        run.learner.step(run.objective, batch, 1e-5)

    return once, int(batch.num_tokens())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print_machine()
    for method in ("lora", "full"):
        cells = [(precision, False) for precision in ("fp32", "mixed", "bf16")] + [("bf16", True)]
        made = {f"{precision}{', packed' if pack else ''}": step(method, precision, pack) for precision, pack in cells}
        seconds = in_turn({name: once for name, (once, _) in made.items()}, rounds)
        auto = find_precision("auto", torch.device("cpu"), trains_all=method == "full")
        print(f"\n{method}: {BATCH_SIZE} demo samples a step, median of {rounds} rounds in turn; auto takes {auto}")
        for name, (_, tokens) in made.items():
            faster = median(seconds["fp32"]) / median(seconds[name])
            print(f"  {name:13} {tokens / median(seconds[name]):8.1f} tokens/s   {faster:.2f} × fp32", flush=True)


if __name__ == "__main__":
    main()
