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
from tunesmith.objectives.sequences import present, weighted_sums
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
        other, counts_N = mismatched(batch)
        ours_N, theirs_N = (weighted_sums(helpers[name].logprobs(other), other) for name in ("policy", "reference"))
        total = torch.stack([((ours_N - theirs_N) * counts_N).sum(), counts_N.sum()]).double()
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
            metrics["kl"] = mean(batch.sequence_columns["kl"][present(batch)])
        return total, metrics


def mismatched(batch: Batch) -> tuple[Batch, Tensor]:
    """Each prompt with the answer to another one, one sequence a row; and [N] 1 where there was another one, else 0.

    The other one is the next in the data whose prompt differs: not the next in the batch, where sequences are numbered as
    they were packed. A prompt is what comes before the first target, an answer all from there on. What would be longer than
    the batch's longest sequence is cut at its end: never more than the model is known to take, and at least one token of the
    answer stays.
    """
    sequences = batch.sequences()
    longest = max(len(tokens) for tokens, _ in sequences)
    starts = [_first_target(weights) for _, weights in sequences]
    prompts = [tokens[:start] for (tokens, _), start in zip(sequences, starts, strict=True)]
    order = batch.sample_N.argsort(stable=True).tolist()
    mixed: list[tuple[Tensor, Tensor]] = [(tokens, weights) for tokens, weights in sequences]
    counts_N = torch.zeros(len(sequences))
    for rank, n in enumerate(order):
        behind = order[rank + 1 :] + order[:rank]
        other = next((other for other in behind if not torch.equal(prompts[other], prompts[n])), None)
        if other is None:  # its own answer is scored, uncounted: all ranks must run the model alike
            continue
        counts_N[n] = 1.0
        (tokens, weights), start = sequences[other], starts[other]
        joined = torch.cat([prompts[n], tokens[start:]]), torch.cat([torch.zeros(starts[n]), weights[start:]])
        mixed[n] = joined[0][:longest], joined[1][:longest]
    return replace(batch_of(mixed), media_N=batch.media_N), counts_N


def _first_target(weights_T: Tensor) -> int:
    """Where the first target stands; the length where there is none."""
    found = weights_T.nonzero()
    return int(found[0]) if len(found) else len(weights_T)
