"""CPO: pairs under a uniform reference."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.objectives.pair_losses import smoothed_logistic
from tunesmith.objectives.pair_objective import PairLogprobs, PairObjective


class Cpo(PairObjective):
    """-log σ(beta · (log p(chosen) - log p(rejected))) + sft_weight · NLL(chosen) / |chosen|.

    Xu et al. 2024 (arXiv 2401.08417), eq. 3 to 5. `loss: hinge` puts max(0, 1 - x) in place of -log σ(x), and `loss: ipo`
    (d - 1/(2 beta))² with d the difference of mean log-probabilities, as in the DPO family. Rewards in metrics: beta · log p,
    with ipo beta · mean log-probability.
    """

    def of_pairs(self, pair: PairLogprobs) -> tuple[Tensor, Tensor, Tensor]:
        beta, chosen_P, rejected_P = self.config.beta, pair.chosen_P, pair.rejected_P
        if self.config.loss == "ipo":
            chosen_P, rejected_P = pair.chosen_mean_P, pair.rejected_mean_P
            loss_P = (chosen_P - rejected_P - 1 / (2 * beta)) ** 2
        elif self.config.loss == "hinge":
            loss_P = torch.relu(1 - beta * (chosen_P - rejected_P))
        else:
            loss_P = smoothed_logistic(beta * (chosen_P - rejected_P), self.config.label_smoothing)
        return loss_P, beta * chosen_P, beta * rejected_P
