"""The losses of the DPO family: each a function of a pair's log-probabilities under the model and the reference.

A reward r is beta times the log-ratio of model and reference; x below is beta times the difference of the pair's two scores,
which are the log-ratios or what an f-divergence makes of them. Shapes: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairScores:
    """What is known of P pairs; summed over each answer's tokens, in nats."""

    chosen_P: Tensor
    """log p(chosen answer | prompt) under the model."""
    rejected_P: Tensor
    ref_chosen_P: Tensor
    """The same under the reference."""
    ref_rejected_P: Tensor
    chosen_length_P: Tensor
    """Targets of the answer."""
    rejected_length_P: Tensor
    config: Any
    """beta, label_smoothing, f_divergence and the like."""
    matched_P: Tensor | None = None
    """aot: the reference's difference (chosen - rejected) that has the rank which this pair's has under the model."""

    @property
    def chosen_ratio_P(self) -> Tensor:
        return self.chosen_P - self.ref_chosen_P

    @property
    def rejected_ratio_P(self) -> Tensor:
        return self.rejected_P - self.ref_rejected_P

    def scores_P(self) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected answer: their log-ratios through the f-divergence."""
        divergence = F_DIVERGENCES[self.config.f_divergence]
        return divergence(self.chosen_ratio_P, self.config), divergence(self.rejected_ratio_P, self.config)

    def x_P(self) -> Tensor:
        """beta times the difference of the two scores."""
        chosen, rejected = self.scores_P()
        return self.config.beta * (chosen - rejected)

    def mean_difference_P(self) -> Tensor:
        """The difference of the two scores, each over its answer's length."""
        chosen, rejected = self.scores_P()
        return chosen / self.chosen_length_P - rejected / self.rejected_length_P

    def smoothed(self, x_P: Tensor) -> Tensor:
        """Negative log-likelihood of the order, with the share `label_smoothing` of the pairs the wrong way round."""
        return smoothed_logistic(x_P, self.config.label_smoothing)


def smoothed_logistic(x_P: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log σ(x) - e log σ(-x)."""
    return -(1 - label_smoothing) * logsigmoid(x_P) - label_smoothing * logsigmoid(-x_P)


def sigmoid(pair: PairScores) -> Tensor:
    """-log σ(x) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); with label smoothing conservative DPO (Mitchell 2023)."""
    return pair.smoothed(pair.x_P())


def sigmoid_norm(pair: PairScores) -> Tensor:
    """The same with scores per token (Lambert et al. 2024, arXiv 2411.15124, eq. 6)."""
    return pair.smoothed(pair.config.beta * pair.mean_difference_P())


def hinge(pair: PairScores) -> Tensor:
    """max(0, 1 - x) (SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, Liu et al. 2023, arXiv 2309.06657)."""
    return torch.relu(1 - pair.x_P())


def ipo(pair: PairScores) -> Tensor:
    """(difference - 1/(2 beta))² (Azar et al. 2023, arXiv 2310.12036, eq. 17), with scores per token: sums would make the
    square grow with the answers' lengths."""
    return (pair.mean_difference_P() - 1 / (2 * pair.config.beta)) ** 2


def exo_pair(pair: PairScores) -> Tensor:
    """KL from the model's preference to the smoothed label (Ji et al. 2024, arXiv 2402.00856, eq. 16)."""
    x_P, smoothing = pair.x_P(), pair.config.label_smoothing
    return torch.sigmoid(x_P) * (logsigmoid(x_P) - math.log1p(-smoothing)) + torch.sigmoid(-x_P) * (
        logsigmoid(-x_P) - math.log(smoothing)
    )


def nca_pair(pair: PairScores) -> Tensor:
    """-log σ(r_c) - ½ log σ(-r_c) - ½ log σ(-r_r) (Chen et al. 2024, arXiv 2402.05369)."""
    chosen, rejected = _rewards(pair)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(pair: PairScores) -> Tensor:
    """Unbiased under labels flipped with the rate e: (-(1-e) log σ(x) + e log σ(-x)) / (1 - 2e) (arXiv 2403.00409)."""
    x_P, smoothing = pair.x_P(), pair.config.label_smoothing
    return (-(1 - smoothing) * logsigmoid(x_P) + smoothing * logsigmoid(-x_P)) / (1 - 2 * smoothing)


def bco_pair(pair: PairScores) -> Tensor:
    """-log σ(r_c) - log σ(-r_r) (Jung et al. 2024, arXiv 2404.04656, with a threshold of 0)."""
    chosen, rejected = _rewards(pair)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(pair: PairScores) -> Tensor:
    """(ratio_c - 1/(2 beta))² + (ratio_r + 1/(2 beta))² (Wu et al. 2024, arXiv 2405.00675, eq. 4.7 with P in {0, 1})."""
    target = 0.5 / pair.config.beta
    return (pair.chosen_ratio_P - target) ** 2 + (pair.rejected_ratio_P + target) ** 2


def aot(pair: PairScores) -> Tensor:
    """First-order stochastic dominance of the model's differences over the reference's, rank by rank in the whole batch
    (Melnyk et al. 2024, arXiv 2406.05882)."""
    assert pair.matched_P is not None, "Dpo.prepare matches the ranks"
    return pair.smoothed(pair.config.beta * (pair.chosen_P - pair.rejected_P - pair.matched_P))


def apo_zero(pair: PairScores) -> Tensor:
    """1 - σ(r_c) + σ(r_r): for answers better than the model's own (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7)."""
    chosen, rejected = _rewards(pair)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(pair: PairScores) -> Tensor:
    """σ(r_c) + 1 - σ(r_c - r_r): for answers worse than the model's own (the same, eq. 8)."""
    chosen, rejected = _rewards(pair)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def discopop(pair: PairScores) -> Tensor:
    """A blend of logistic and exponential loss by σ(x / tau) (Lu et al. 2024, arXiv 2406.08414, eq. 5)."""
    x_P, tau = pair.x_P(), pair.config.discopop_tau
    # in one exponent: exp(-x) alone overflows where its share is 0
    exponential = torch.exp(logsigmoid(x_P / tau) - x_P)
    return -logsigmoid(x_P) * torch.sigmoid(-x_P / tau) + exponential


def _rewards(pair: PairScores) -> tuple[Tensor, Tensor]:
    return pair.config.beta * pair.chosen_ratio_P, pair.config.beta * pair.rejected_ratio_P


PAIR_LOSSES: dict[str, Callable[[PairScores], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
"""Name → loss of each pair, [P]. To add one: a function here, a line, its name in config_objectives.PairLoss."""


def _alpha_divergence(ratio_P: Tensor, config: Any) -> Tensor:
    """(1 - t^-α) / α with t the ratio: reverse KL as α falls to 0, forward KL at 1. (TRL's coefficient is 1 - α.)"""
    alpha = config.alpha_divergence
    return -_expm1(-alpha * ratio_P) / alpha


def _expm1(x_P: Tensor) -> Tensor:
    """exp(x) - 1, held where its square too is below fp32's overflow."""
    return torch.expm1(x_P.clamp(max=40.0))


F_DIVERGENCES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reverse_kl": lambda ratio_P, _config: ratio_P,
    "forward_kl": lambda ratio_P, _config: -_expm1(-ratio_P),
    "js": lambda ratio_P, _config: math.log(2) + logsigmoid(ratio_P),
    "alpha": _alpha_divergence,
}
"""Name → f'(t) of a log-ratio log t (Wang et al. 2024, arXiv 2309.16240, table 1)."""
