"""What the benchmarks share: timing in turn, and a table."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

import torch


def in_turn(sides: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round. The sides take turns, so that a busy machine slows all alike; one warm-up.

    A side that returns seconds has taken its own time, without what it does only because it is measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            start = perf_counter()
            own = run()
            if round_:
                seconds[name].append(perf_counter() - start if own is None else own)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of (their seconds / our seconds): above 1, we are faster."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


def print_machine() -> None:
    print(
        f"torch {torch.__version__} · {torch.get_num_threads()} threads · {platform.processor() or platform.machine()}"
    )


__all__ = ["in_turn", "median", "perf_counter", "print_machine", "ratio"]
