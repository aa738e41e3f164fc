"""The training loop. It knows no objective, method or engine by name; logging, evaluation and saving are hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tunesmith.hooks.base import Hook
from tunesmith.learner import Learner
from tunesmith.methods import NonFiniteError
from tunesmith.objectives import Objective
from tunesmith.types import Batch


def train(
    learner: Learner,
    objective: Objective,
    helpers: Mapping[str, Any],
    data: Callable[[int], Batch],
    lr: Callable[[int], float],
    *,
    steps: int,
    start: int = 0,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Run updates `start` … `steps`-1, and return how many have been done in all.

    Data and random streams are functions of the step, so resuming is starting at k. `stop` is asked between steps.
    """
    step = start
    while step < steps and not stop():
        batch = data(step)
        learner.engine.seed(seed, step)
        for ready in objective.prepare(batch, helpers):
            try:
                metrics = learner.step(objective, ready, lr(step))
            except NonFiniteError as error:
                error.step = step
                raise
        metrics["lr"] = torch.tensor(lr(step))
        step += 1
        for hook in hooks:
            hook(step, metrics, learner)
    return step
