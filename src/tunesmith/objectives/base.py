"""What an objective is: a function of scores. It never sees the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from tunesmith.types import Batch, Scores

Metrics = dict[str, Tensor]


class Objective:
    """Base of all objectives. Losses are sums over a micro-batch; the learner divides once, by the global count."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Helpers to build: reference, teacher, sampler, reward, critic."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Parts of Scores beyond the log-probabilities."""
    learns_all: ClassVar[bool] = False
    """Whether every token is a target, or only answers."""
    pairs: ClassVar[bool] = False
    """Whether a sample is a preference pair: two sequences that never part, the chosen one first."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare(self, batch: Batch, helpers: Mapping[str, Any]) -> Iterable[Batch]:
        """What is to be done once per batch and without gradient; yields the batches to step on."""
        yield batch

    def count(self, batch: Batch) -> Tensor:
        """The denominator of the loss over this batch: tokens, pairs or sequences; scalar."""
        raise NotImplementedError

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss summed over the micro-batch, and further sums to report; scalars."""
        raise NotImplementedError
