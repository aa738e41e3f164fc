"""Seconds until `tunesmith --help` answers, and what importing tunesmith loads.

python benchmarks/startup/run.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from statistics import median
from time import perf_counter

LOADED = "import tunesmith, tunesmith.cli, sys; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    sides = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "tunesmith --help": [sys.executable, "-m", "tunesmith", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, command in sides.items():
            start = perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(perf_counter() - start)
    for name, times in seconds.items():
        print(f"  {name:17} {median(times):.3f} s (median of {rounds})")
    found = subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True).stdout.strip()
    print(f"  importing tunesmith and its command line loads, of torch, transformers and pydantic: {found}")


if __name__ == "__main__":
    main()
