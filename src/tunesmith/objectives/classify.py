"""Classification by label words."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tunesmith.objectives.base import Metrics, Objective, mean
from tunesmith.objectives.terms import choice_accuracy, choice_loss
from tunesmith.types import Batch, Form, Scores, Wanted


class Classify(Objective):
    """-log (p(right word) / Σ_k p(word k)) at the one position where the label words differ; a mean over sequences.

    `loss: accuracy` counts instead how often the right word is not the likeliest of them: 1 - accuracy, without gradient.
    A verbalizer as in Schick and Schütze 2021 (arXiv 2001.07676), section 3.1: the model's own words and no new head.
    """

    reads = frozenset({"choices"})
    form: ClassVar[Form] = "choices"
    unit = "nats per sequence"
    shows: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.loss == "accuracy":
            self.no_gradient, self.unit = "objective.loss: accuracy", "wrong per sequence (0 to 1)"
            self.wanted = Wanted(observed={"accuracy": choice_accuracy, "cross_entropy": choice_loss}, among="choices")
        else:
            self.wanted = Wanted(
                token_loss=choice_loss, observed={"accuracy": choice_accuracy}, among="choices", is_likelihood=True
            )

    def count(self, batch: Batch) -> Tensor:
        return batch.weights_BT.sum()

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        metrics = {name: mean(found_BT, batch.weights_BT) for name, found_BT in scores.observed.items()}
        loss_BT = 1 - scores.observed["accuracy"] if self.no_gradient else scores.token_loss_BT
        assert loss_BT is not None
        return (loss_BT * batch.weights_BT).sum(), metrics
