"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from tunesmith.objectives.base import Metrics, Objective
from tunesmith.types import Batch, Scores


class Sft(Objective):
    """Weighted negative log-likelihood of the answers: - sum_t w_t log p(token_t) / sum_t w_t, in nats per target token."""

    def count(self, batch: Batch) -> Tensor:
        return batch.weights_BT.sum()

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        return -(scores.logprobs_BT * batch.weights_BT).sum(), {}
