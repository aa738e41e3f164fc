"""What a scorer is: it says what the model would say of a batch at several points near its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tunesmith.models.low_rank import Probe
from tunesmith.types import Batch, Scores, Wanted


class ScoringEngine(Protocol):
    """What a scorer asks of an engine."""

    def score(self, model: Any, batch: Batch, wanted: Wanted | None = None) -> Scores: ...


class Scorer:
    """Base of all scorers. Scoring leaves the parameters' bits as they are."""

    def __init__(self, model: Any, engine: ScoringEngine, directions: Any) -> None:
        self.model, self.engine, self.directions = model, engine, directions

    def check(self) -> None:
        """Find out whether the model can be scored so. Raises UserError if not."""

    def copies(self, num_probes: int) -> int:
        """How often a micro-batch is in the model at once."""
        return 1

    def score(self, batch: Batch, wanted: Wanted, probes: Sequence[Probe]) -> list[Scores]:
        """The scores of the batch under each probe's state, without gradient."""
        raise NotImplementedError
