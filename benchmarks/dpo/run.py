"""DPO on SmolLM2-135M: ours and TRL's DPOTrainer on the same pairs, in turn; pairs per second and peak memory.

    python benchmarks/dpo/run.py [--data pairs.jsonl] [--method lora|full] [--reference live|precompute] [--rounds 3]

Every side runs in a process of its own, on the same token ids, 8 pairs an update. TRL's micro-batch is the fastest of those
given by --trl-batch; ours is 1024 tokens. The first step of each process warms up and does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import median, print_machine
from pairs import write_pairs

HERE = Path(__file__).parent


def measure(side: str, data: str, args: argparse.Namespace, *more: str) -> tuple[list[float], int]:
    """Seconds of each step but the first, and the peak of resident memory."""
    command = [
        sys.executable, str(HERE / "side.py"), side, "--data", data, "--method", args.method, "--reference", args.reference,
        "--precision", args.precision, "--pairs", str(args.pairs), "--steps", str(args.steps), *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"][1:], found["peak_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="A .jsonl of preference pairs; default: made here, with hh-rlhf's lengths.")
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--reference", choices=["live", "precompute"], default="live")
    parser.add_argument("--precision", choices=["fp32", "mixed", "bf16"], default="fp32")
    parser.add_argument("--pairs", type=int, default=8, help="Pairs an update.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--trl-batch", type=int, nargs="+", default=[1, 4, 8], help="TRL's pairs a micro-batch.")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data
        if data is None:
            data = str(Path(folder) / "pairs.jsonl")
            write_pairs(Path(data), args.pairs * args.steps)
        sides = {"ours": ()} | {f"TRL, {size} a micro-batch": ("--trl-batch", str(size)) for size in args.trl_batch}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peaks: dict[str, list[int]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, more in sides.items():
                times, peak = measure("ours" if name == "ours" else "trl", data, args, *more)
                seconds[name].append(sum(times))
                peaks[name].append(peak)
    pairs = args.pairs * (args.steps - 1)
    print(f"{args.method} · reference {args.reference} · {args.precision} · {args.pairs} pairs an update")
    for name in sides:
        print(
            f"{name:24} {pairs / median(seconds[name]):6.2f} pairs/s   {median(peaks[name]) / 2**30:5.2f} GiB at most"
        )
    best = min((name for name in sides if name != "ours"), key=lambda name: median(seconds[name]))
    speed = median(b / a for a, b in zip(seconds["ours"], seconds[best], strict=True))
    memory = median(b / a for a, b in zip(peaks["ours"], peaks[best], strict=True))
    print(f"ratio to {best}: {speed:.2f} × the pairs/s, its peak memory is {memory:.2f} × ours")


if __name__ == "__main__":
    main()
