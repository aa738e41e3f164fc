"""The table of learning-rate schedules: the factor on the peak rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def _constant(config: Any, done: float, share: float) -> float:
    return 1.0


def _linear(config: Any, done: float, share: float) -> float:
    return config.final_fraction + (1 - config.final_fraction) * (1 - done)


def _cosine(config: Any, done: float, share: float) -> float:
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))


def _wsd(config: Any, done: float, share_after_warmup: float) -> float:
    if not config.decay_fraction:
        return 1.0
    left = min(1.0, (1 - done) * share_after_warmup / config.decay_fraction)
    return config.final_fraction + (1 - config.final_fraction) * left


SCHEDULES: dict[str, Callable[[Any, float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
}
"""name → factor at a share `done` (0 … 1) of the steps after warmup."""


def build_schedule(config: Any, peak_lr: float, steps: int) -> Callable[[int], float]:
    """lr(step), with steps counted from 0. Warmup rises to the peak at its last step; the last step of all is the lowest."""
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_fraction * steps)
    warmup = min(warmup, steps)
    shape = SCHEDULES[config.name]

    def lr(step: int) -> float:
        if step < warmup:
            return peak_lr * (step + 1) / warmup
        return peak_lr * shape(config, min(1.0, (step - warmup) / max(1, steps - warmup)), (steps - warmup) / steps)

    return lr
