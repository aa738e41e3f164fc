"""What the benchmarks share: timing in turn, and a table."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch


def in_turn(sides: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round. The sides take turns, so that a busy machine slows all alike; one warm-up.

    A side that returns seconds has taken its own time, without what it does only because it is measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            synchronize()
            start = perf_counter()
            own = run()
            synchronize()
            if round_:
                seconds[name].append(perf_counter() - start if own is None else own)
    return seconds


def synchronize() -> None:
    """Wait for what an accelerator still has to do, so that it is not counted as the next side's."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of (their seconds / our seconds): above 1, we are faster."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


def in_own_process(file: str, *arguments: str, quiet: bool = False) -> Any:
    """What the benchmark `file` prints last, as JSON, when it is run again with its own and these arguments. `quiet`: what it
    says on the way is shown only if it fails."""
    command = [sys.executable, file, *sys.argv[1:], *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed: {done.stderr or ''}")
    return json.loads(done.stdout.splitlines()[-1])


def print_machine() -> None:
    print(
        f"torch {torch.__version__} · {torch.get_num_threads()} threads · {platform.processor() or platform.machine()}"
    )


__all__ = ["in_own_process", "in_turn", "median", "perf_counter", "print_machine", "ratio", "synchronize"]
