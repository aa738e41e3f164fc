"""The held-out loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from torch import Tensor

from tunesmith.hooks.log import Log
from tunesmith.learner import Learner
from tunesmith.objectives import Objective
from tunesmith.types import Batch


class Evaluate:
    """Scores the held-out batches every `every` steps (0: only when `measure` is called)."""

    def __init__(
        self, objective: Objective, helpers: Mapping[str, Any], batches: Sequence[Batch], log: Log | None, every: int
    ) -> None:
        """log: None where another rank writes."""
        self.objective, self.helpers, self.batches, self.log, self.every = objective, helpers, batches, log, every
        self.losses: dict[int, float] = {}

    def __call__(self, step: int, metrics: Mapping[str, Tensor], learner: Learner) -> None:
        if self.every and step % self.every == 0:
            self.measure(step, learner)

    def measure(self, step: int, learner: Learner) -> None:
        """Score now, unless this step is already measured or nothing is held out."""
        if not self.batches or step in self.losses:
            return
        start = perf_counter()
        learner.engine.group.at(step, "evaluation")
        metrics = {
            name: float(value) for name, value in learner.evaluate(self.objective, self.batches, self.helpers).items()
        }
        self.losses[step] = metrics["loss"]
        if self.log is None:
            return
        self.log.events.write("eval", step=step, **metrics, seconds=round(perf_counter() - start, 2))
        shown = "".join(f" · {name} {metrics[name]:.3f}" for name in self.objective.shows if name in metrics)
        self.log.progress.say(f"held-out loss at step {step}: {metrics['loss']:.4f}{shown}")
        self.log.pause()
