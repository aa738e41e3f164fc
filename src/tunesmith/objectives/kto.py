"""KTO: answers marked as desirable or not, no pairs needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.pack import batch_of
from tunesmith.objectives.base import Metrics, mean
from tunesmith.objectives.feedback import FeedbackObjective
from tunesmith.objectives.sequences import weighted_sums
from tunesmith.types import Batch, Scores


class Kto(FeedbackObjective):
    """w_d · (1 - σ(r - z)) of a desirable answer, w_u · (1 - σ(z - r)) of another; a mean over answers.

    r = beta · (log p - log p_ref)(answer), z = beta · max(0, KL estimate).
    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8.
    `loss: apo_zero_unpaired` has z = 0 (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7, each half by itself).

    The KL estimate is the mean over the whole batch, on all ranks, of log p - log p_ref of answers under prompts that they do
    not belong to (section 4.1); it carries no gradient. Metric kl: this estimate, in nats.
    """

    unit = "loss per answer"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.needs = frozenset({"reference", "policy"} if config.loss == "kto" else {"reference"})

    def prepare(self, batch: Batch, helpers: Mapping[str, Any]) -> Iterable[Batch]:
        """Adds the reference's log-probabilities, and the KL estimate."""
        for ready in super().prepare(batch, helpers):
            yield self._with_kl(ready, helpers) if self.config.loss == "kto" else ready

    def _with_kl(self, batch: Batch, helpers: Mapping[str, Any]) -> Batch:
        other = mismatched(batch)
        ours_N, theirs_N = (weighted_sums(helpers[name].logprobs(other), other) for name in ("policy", "reference"))
        # with one answer there is no other prompt; it is scored all the same, since all ranks must run the model alike
        number = len(batch.sample_N) if len(batch.sample_N) > 1 else 0
        total = torch.stack([(ours_N - theirs_N).double().sum() * bool(number), torch.tensor(float(number)).double()])
        total = helpers["policy"].sum(total)
        kl = (total[0] / total[1].clamp(min=1)).clamp(min=0).to(ours_N.dtype)
        return batch.with_columns(sequences={"kl": kl.repeat(len(batch.sample_N))})

    def thresholds(self, rewards_M: Tensor, here: Tensor, batch: Batch) -> Tensor:
        if self.config.loss != "kto":
            return torch.zeros_like(rewards_M)
        return self.config.beta * batch.sequence_columns["kl"][here].to(rewards_M.dtype)

    def of_rewards(self, rewards_M: Tensor, desirable_M: Tensor, threshold_M: Tensor) -> Tensor:
        over_M = rewards_M - threshold_M
        config = self.config
        return torch.where(
            desirable_M,
            config.desirable_weight * torch.sigmoid(-over_M),
            config.undesirable_weight * torch.sigmoid(over_M),
        )

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        total, metrics = super().loss(scores, batch)
        if self.config.loss == "kto":
            metrics["kl"] = mean(batch.sequence_columns["kl"])
        return total, metrics


def mismatched(batch: Batch) -> Batch:
    """Each prompt with the answer of the batch's next sample, the last with the first one's; one sequence a row.

    Next is what comes next in the data, and not in the batch, where sequences are numbered as they were packed.
    A prompt is what comes before the first target, an answer all from there on. What would be longer than the batch's longest
    sequence is cut at its end: never more than the model is known to take, and at least one token of the answer stays.
    """
    sequences = batch.sequences()
    longest = max(len(tokens) for tokens, _ in sequences)
    starts = [_first_target(weights) for _, weights in sequences]
    order = batch.sample_N.argsort(stable=True)
    next_N = torch.empty_like(order).scatter_(0, order, order.roll(-1)).tolist()
    mixed = []
    for n, (prompt, _) in enumerate(sequences):
        other = next_N[n]
        tokens, weights = sequences[other]
        mixed.append((
            torch.cat([prompt[: starts[n]], tokens[starts[other] :]])[:longest],
            torch.cat([weights.new_zeros(starts[n]), weights[starts[other] :]])[:longest],
        ))  # fmt: skip
    return replace(batch_of(mixed), media_N=batch.media_N)


def _first_target(weights_T: Tensor) -> int:
    """Where the first target stands; the length where there is none."""
    found = weights_T.nonzero()
    return int(found[0]) if len(found) else len(weights_T)
