"""Ranks that were dropped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tunesmith.hooks.log import Log
from tunesmith.learner import Learner


class Ranks:
    """Tells of each rank that the group has lost, as an event and in the terminal; the step is the one it had no part in."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __call__(self, step: int, metrics: Mapping[str, Tensor], learner: Learner) -> None:
        for rank, why in learner.engine.group.pop_lost():
            self.log.events.write("rank_lost", step=step, rank=rank, why=why)
            there = ", ".join(map(str, learner.engine.group.ranks))
            self.log.progress.say(f"warning: step {step}: rank {rank} {why}; it is dropped, and {there} go on")
