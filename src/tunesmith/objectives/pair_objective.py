"""What objectives on preference pairs share. Shapes: P pairs of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunesmith.objectives.base import Metrics, Objective
from tunesmith.objectives.metrics import entropy_metric, logprob_metrics, pair_metrics
from tunesmith.objectives.sequences import lengths, num_pairs, pairs, weighted_sums
from tunesmith.objectives.terms import entropy
from tunesmith.types import Batch, Form, Scores, Wanted


@dataclass(frozen=True)
class PairLogprobs:
    """What the model says about pairs: log-probabilities of the answers, summed over their tokens, in nats."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_length_P: Tensor
    """Targets of the answer."""
    rejected_length_P: Tensor

    @property
    def chosen_mean_P(self) -> Tensor:
        """Per token."""
        return self.chosen_P / self.chosen_length_P

    @property
    def rejected_mean_P(self) -> Tensor:
        """Per token."""
        return self.rejected_P / self.rejected_length_P


class PairObjective(Objective):
    """A mean over pairs of loss(pair) + sft_weight · NLL(chosen) / |chosen|, in nats per pair."""

    reads = frozenset({"logits"})
    wanted = Wanted(observed={"entropy": entropy}, additive=frozenset({"entropy"}))
    form: ClassVar[Form] = "pairs"
    unit = "nats per pair"
    shows: ClassVar[tuple[str, ...]] = ("rewards/accuracy",)

    @property
    def sft_weight(self) -> float:
        """Weight of the chosen answer's mean negative log-likelihood."""
        return float(self.config.sft_weight)

    def of_pairs(self, pair: PairLogprobs) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair without the likelihood; the chosen and the rejected answer's reward; [P] each."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        return num_pairs(batch)

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        pair = pair_logprobs(scores.logprobs_BT, batch)
        loss_P, chosen_P, rejected_P = self.of_pairs(pair)
        metrics = pair_metrics(chosen_P, rejected_P) | logprob_metrics(pair.chosen_P, pair.rejected_P)
        return (loss_P + self.likelihood(pair)).sum(), metrics | entropy_metric(scores, batch)

    def likelihood(self, pair: PairLogprobs) -> Tensor | float:
        """The term that holds up the chosen answers' likelihood, [P]."""
        return -self.sft_weight * pair.chosen_mean_P if self.sft_weight else 0.0


def pair_logprobs(logprobs_BT: Tensor, batch: Batch) -> PairLogprobs:
    """Of the pairs in a micro-batch."""
    logprobs_N = weighted_sums(logprobs_BT, batch)
    length_N = lengths(batch, logprobs_N)
    chosen, rejected = pairs(batch)
    return PairLogprobs(logprobs_N[chosen], logprobs_N[rejected], length_N[chosen], length_N[rejected])
