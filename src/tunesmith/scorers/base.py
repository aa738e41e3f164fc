"""What a scorer is: it says what the model would say of a batch at several points near its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tunesmith.models.low_rank import Probe
from tunesmith.types import Batch, Scores, Wanted

if TYPE_CHECKING:
    from tunesmith.methods.update_log import Update


class ScoringEngine(Protocol):
    """What a scorer asks of an engine."""

    def score(self, model: Any, batch: Batch, wanted: Wanted | None = None) -> Scores: ...


class Scorer:
    """Base of all scorers. Scoring leaves the parameters' bits as they are."""

    reads: ClassVar[frozenset[str] | None] = None
    """Parts of Scores beyond log-probabilities that it can give; None: those of the engine."""
    holds_weights: ClassVar[bool] = False
    """Whether it scores weights of its own, with which held-out data is then scored too."""

    @classmethod
    def check_installed(cls) -> None:
        """Raises UserError if what it runs on is not here."""

    def __init__(
        self, model: Any, engine: ScoringEngine, directions: Any, config: Any, num_states: int = 2, extent: Any = None
    ) -> None:
        """config: the method's; num_states: the most that are scored at once; extent: of the run, `methods.Extent`."""
        self.model, self.engine, self.directions, self.config = model, engine, directions, config
        self.num_states, self.extent = num_states, extent

    def check(self) -> None:
        """Make ready, and find out whether the model can be scored so. Raises UserError if not."""

    def follow(self, update: Update) -> None:
        """Learn of an update that the directions have taken."""

    def copies(self, num_probes: int) -> int:
        """How often a micro-batch is in the model at once."""
        return 1

    def score(self, batch: Batch, wanted: Wanted, probes: Sequence[Probe]) -> list[Scores]:
        """The scores of the batch under each probe's state, without gradient."""
        raise NotImplementedError
