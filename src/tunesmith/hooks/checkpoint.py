"""The whole state, from time to time."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

from torch import Tensor

from tunesmith.config import CheckpointConfig
from tunesmith.hooks.log import Log
from tunesmith.learner import Learner
from tunesmith.objectives import Objective
from tunesmith.run_folder import RunFolder


class Checkpoint:
    """Saves when so many steps are done or minutes have passed. `saved`: the step of the newest checkpoint so far; `log`: None
    on ranks that give their part, and leave it to another one to tell of it."""

    def __init__(
        self, folder: RunFolder, log: Log | None, config: CheckpointConfig, objective: Objective, saved: int
    ) -> None:
        self.folder, self.log, self.config, self.objective = folder, log, config, objective
        self.saved, self.since = saved, perf_counter()

    def __call__(self, step: int, metrics: Mapping[str, Tensor], learner: Learner) -> None:
        every_steps, every_s = self.config.every_steps, 60 * self.config.every_minutes
        due = bool(every_steps) and step % every_steps == 0
        if not due and every_s:  # clocks differ
            due = bool(learner.engine.group.agree(perf_counter() - self.since >= every_s))
        if due:
            self.save(step, learner)

    def save(self, step: int, learner: Learner) -> None:
        """Save now, unless this step is saved already."""
        if step == self.saved:
            return
        state = learner.method.state_dict() | {"objective": self.objective.state_dict()}
        learner.engine.save_checkpoint(self.folder.checkpoints, step, state, self.config.keep)
        self.saved, self.since = step, perf_counter()
        if self.log is not None:
            self.log.events.write("checkpoint", step=step)
            self.log.pause()
