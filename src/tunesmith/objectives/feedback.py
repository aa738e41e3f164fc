"""What objectives on answers marked as desirable or not share. Shapes: N sequences of the batch, M of this micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunesmith.objectives.base import Metrics, Objective, mean
from tunesmith.objectives.metrics import entropy_metric, feedback_metrics
from tunesmith.objectives.sequences import present, weighted_sums
from tunesmith.objectives.terms import entropy
from tunesmith.types import Batch, Form, Scores, Wanted


class FeedbackObjective(Objective):
    """A mean over answers of loss(reward), reward = beta · (log p - log p_ref) of the whole answer, in nats."""

    needs = frozenset({"reference"})
    reads = frozenset({"logits"})
    wanted = Wanted(observed={"entropy": entropy}, additive=frozenset({"entropy"}))
    form: ClassVar[Form] = "feedback"
    unit = "nats per answer"
    shows: ClassVar[tuple[str, ...]] = ("rewards/accuracy",)

    def of_rewards(self, rewards_M: Tensor, desirable_M: Tensor, threshold_M: Tensor) -> Tensor:
        """The loss of each answer, [M]; desirable: bool."""
        raise NotImplementedError

    def thresholds(self, rewards_M: Tensor, here: Tensor, batch: Batch) -> Tensor:
        """The reward that tells desirable answers from others, [M]."""
        raise NotImplementedError

    def prepare(self, batch: Batch, helpers: Mapping[str, Any]) -> Iterable[Batch]:
        """Adds the reference's log-probabilities."""
        yield batch.with_columns(tokens={"reference": helpers["reference"].logprobs(batch)})

    def derived(self, metrics: Mapping[str, Tensor]) -> Metrics:
        """The margin between the two kinds' mean rewards, where a batch has both."""
        if "rewards/chosen" not in metrics or "rewards/rejected" not in metrics:
            return {}
        return {"rewards/margin": metrics["rewards/chosen"] - metrics["rewards/rejected"]}

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(present(batch)))

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        here = present(batch)
        logprobs_N = weighted_sums(scores.logprobs_BT, batch)
        reference_N = weighted_sums(batch.token_columns["reference"].to(logprobs_N.dtype), batch)
        rewards_M = self.config.beta * (logprobs_N - reference_N)[here]
        desirable_M = batch.sequence_columns["label"][here] > 0.5
        threshold_M = self.thresholds(rewards_M, here, batch)
        metrics = feedback_metrics(rewards_M, logprobs_N[here], desirable_M, threshold_M)
        metrics["kl"] = mean(rewards_M / self.config.beta)
        loss_M = self.of_rewards(rewards_M, desirable_M, threshold_M)
        return loss_M.sum(), metrics | entropy_metric(scores, batch)
