"""Classification by label words."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tunesmith.objectives.base import Metrics, Objective, mean
from tunesmith.objectives.terms import choice_accuracy, choice_loss
from tunesmith.types import Batch, Form, Scores, Wanted


class Classify(Objective):
    """-log (p(right word) / Σ_k p(word k)) at the one position where the label words differ; a mean over sequences.

    A verbalizer as in Schick and Schütze 2021 (arXiv 2001.07676), section 3.1: the model's own words and no new head.
    """

    reads = frozenset({"choices"})
    form: ClassVar[Form] = "choices"
    unit: ClassVar[str] = "nats per sequence"
    shows: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.wanted = Wanted(
            token_loss=choice_loss, observed={"accuracy": choice_accuracy}, among="choices", is_likelihood=True
        )

    def count(self, batch: Batch) -> Tensor:
        return batch.weights_BT.sum()

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        assert scores.token_loss_BT is not None
        accuracy = mean(scores.observed["accuracy"], batch.weights_BT)
        return (scores.token_loss_BT * batch.weights_BT).sum(), {"accuracy": accuracy}
