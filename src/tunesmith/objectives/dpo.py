"""Direct preference optimisation and its family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.objectives.base import Metrics, mean
from tunesmith.objectives.metrics import entropy_metric, logprob_metrics, pair_metrics
from tunesmith.objectives.pair_losses import PAIR_LOSSES, PairScores
from tunesmith.objectives.pair_objective import PairObjective, pair_logprobs
from tunesmith.objectives.sequences import pairs, sums, target_ranks
from tunesmith.types import Batch, Scores


class Dpo(PairObjective):
    """Preference pairs against a reference (Rafailov et al. 2023, arXiv 2305.18290), in nats per pair.

    L = Σ_k w_k · loss_k(pair) + sft_weight · NLL(chosen) / |chosen|, a mean over pairs; for `loss: sigmoid`
    loss = -log σ(beta · ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))).
    The likelihood term is that of RPO (arXiv 2404.19733) and MPO (arXiv 2411.10442).

    Metric kl: the mean over answers, chosen and rejected, of log p - log p_ref. The answers are the data's and not the model's,
    so it may be negative; it tells how far the model has moved from the reference on them.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.needs = frozenset({"reference", "policy"} if "aot" in config.loss else {"reference"})

    def prepare(self, batch: Batch, helpers: Mapping[str, Any]) -> Iterable[Batch]:
        """Adds the reference's log-probabilities; for aot also which of them each pair is compared with."""
        batch = batch.with_columns(tokens={"reference": helpers["reference"].logprobs(batch)})
        if "aot" in self.config.loss:
            batch = batch.with_columns(sequences={"matched": self._matched(batch, helpers["policy"])})
        yield batch

    def _matched(self, batch: Batch, policy: Any) -> Tensor:
        """For each pair, at its chosen sequence, the reference's difference of equal rank in the whole batch, [N].

        The model's ranks are taken without dropout; the differences that carry the gradient are those of the step itself.
        """
        weight_BT = self._weights(batch)
        chosen, rejected = pairs(batch)
        ours_N, theirs_N = (
            sums(x_BT * weight_BT, batch) for x_BT in (policy.logprobs(batch), batch.token_columns["reference"])
        )
        ours_P, theirs_P = (x_N[chosen] - x_N[rejected] for x_N in (ours_N, theirs_N))
        matched_N = torch.zeros_like(theirs_N)
        matched_N[chosen[ours_P.argsort(stable=True)]] = theirs_P.sort().values
        return matched_N

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        config, weight_BT = self.config, self._weights(batch)
        plain = pair_logprobs(scores.logprobs_BT, batch)
        policy_N = sums(scores.logprobs_BT * weight_BT, batch)
        reference_N = sums(batch.token_columns["reference"].to(policy_N.dtype) * weight_BT, batch)
        chosen, rejected = pairs(batch)
        pair = PairScores(
            policy_N[chosen], policy_N[rejected], reference_N[chosen], reference_N[rejected],
            plain.chosen_length_P, plain.rejected_length_P, config,
            batch.sequence_columns["matched"][chosen] if "aot" in config.loss else None,
        )  # fmt: skip
        losses_KP = torch.stack([weight * PAIR_LOSSES[name](pair) for name, weight in config.loss.items()])
        ratios = pair.chosen_ratio_P, pair.rejected_ratio_P
        metrics = pair_metrics(config.beta * ratios[0], config.beta * ratios[1]) | {"kl": mean(torch.cat(ratios))}
        metrics |= logprob_metrics(plain.chosen_P, plain.rejected_P) | entropy_metric(scores, batch)
        return (losses_KP.sum(0) + self.likelihood(plain)).sum(), metrics

    def _weights(self, batch: Batch) -> Tensor:
        """Weight of each target in its answer's log-probability, [B, T]: for LD-DPO (Liu et al. 2024, arXiv 2409.06411, eq. 9)
        those beyond the shorter answer's length count `ld_alpha`."""
        if self.config.ld_alpha == 1:
            return batch.weights_BT
        number_N = sums((batch.weights_BT != 0).long(), batch)
        chosen, rejected = pairs(batch)
        shorter_N = torch.zeros_like(number_N)
        shorter_N[chosen] = shorter_N[rejected] = torch.minimum(number_N[chosen], number_N[rejected])
        is_tail_BT = target_ranks(batch) > shorter_N[batch.sequence_BT]
        return torch.where(is_tail_BT, self.config.ld_alpha * batch.weights_BT, batch.weights_BT)
