"""SimPO: mean log-probabilities as rewards."""

from __future__ import annotations

from torch import Tensor

from tunesmith.objectives.pair_losses import smoothed_logistic
from tunesmith.objectives.pair_objective import PairLogprobs, PairObjective


class Simpo(PairObjective):
    """-log σ(r(chosen) - r(rejected) - gamma) with r = beta · mean log-probability of the answer's tokens.

    Meng et al. 2024 (arXiv 2405.14734), eq. 6; with label smoothing as in conservative DPO, and with
    `sft_weight` · NLL(chosen) / |chosen|.
    """

    def of_pairs(self, pair: PairLogprobs) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        chosen_P, rejected_P = config.beta * pair.chosen_mean_P, config.beta * pair.rejected_mean_P
        loss_P = smoothed_logistic(chosen_P - rejected_P - config.gamma, config.label_smoothing)
        return loss_P, chosen_P, rejected_P
