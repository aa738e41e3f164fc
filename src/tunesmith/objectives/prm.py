"""Process reward models."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from tunesmith.objectives.base import Metrics, Objective, mean
from tunesmith.objectives.sequences import num_targets
from tunesmith.types import Batch, Form, Scores, Wanted


class Prm(Objective):
    """Cross-entropy of whether a step is right (class 1) or wrong (class 0), read at the step's last token; a mean over steps.

    Lightman et al. 2023 (arXiv 2305.20050), section 2.6; Uesato et al. 2022 (arXiv 2211.14275), section 2.
    The batch's weight is +1 at the end of a right step and -1 at the end of a wrong one.
    """

    reads = frozenset({"values"})
    wanted = Wanted(values=True)
    form: ClassVar[Form] = "steps"
    head: ClassVar[Literal["language", "sequence", "token"]] = "token"
    num_labels: ClassVar[int] = 2
    unit = "nats per step"
    shows: ClassVar[tuple[str, ...]] = ("accuracy",)

    def count(self, batch: Batch) -> Tensor:
        return num_targets(batch)

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        assert scores.values_BTC is not None
        is_end_BT = batch.weights_BT != 0
        values_SC = scores.values_BTC[is_end_BT]  # S steps
        right_S = (batch.weights_BT[is_end_BT] > 0).long()
        accuracy_S = (values_SC.argmax(-1) == right_S).to(values_SC.dtype)
        return cross_entropy(values_SC, right_S, reduction="sum"), {"accuracy": mean(accuracy_S)}
