"""Reward models."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Metrics, Objective
from tunesmith.objectives.metrics import pair_metrics
from tunesmith.objectives.sequences import at_last_token, num_pairs, pairs
from tunesmith.types import Batch, Form, Scores, Wanted


class Reward(Objective):
    """-log σ(r(chosen) - r(rejected) - margin) + center · (r(chosen) + r(rejected))², a mean over pairs.

    r is what the head says at the sequence's last token. Bradley-Terry, as in Ouyang et al. 2022 (arXiv 2203.02155, eq. 1);
    margin: Touvron et al. 2023 (arXiv 2307.09288, eq. 2), 0 where the data says none; center: Eisenstein et al. 2023
    (arXiv 2312.09244, section 2).
    """

    reads = frozenset({"values"})
    wanted = Wanted(values=True)
    form: ClassVar[Form] = "pairs"
    head: ClassVar[Literal["language", "sequence", "token"]] = "sequence"
    num_labels: ClassVar[int] = 1
    unit = "nats per pair"
    shows: ClassVar[tuple[str, ...]] = ("rewards/accuracy",)

    def count(self, batch: Batch) -> Tensor:
        return num_pairs(batch)

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        assert scores.values_BTC is not None
        rewards_N = at_last_token(scores.values_BTC, batch)[:, 0]
        chosen, rejected = pairs(batch)
        chosen_P, rejected_P = rewards_N[chosen], rewards_N[rejected]
        margin_P = batch.sequence_columns["label"][chosen].to(rewards_N.dtype)
        loss_P = -logsigmoid(chosen_P - rejected_P - margin_P)
        if self.config.center:
            loss_P = loss_P + self.config.center * (chosen_P + rejected_P) ** 2
        return loss_P.sum(), pair_metrics(chosen_P, rejected_P)
