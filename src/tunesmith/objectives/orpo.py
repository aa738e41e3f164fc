"""ORPO: fine-tuning and an odds ratio of pairs in one."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.pair_objective import PairLogprobs, PairObjective


class Orpo(PairObjective):
    """NLL(chosen) / |chosen| - beta · log σ(log odds(chosen) - log odds(rejected)).

    odds(y) = P / (1 - P), where log P is the mean log-probability of y's tokens. Hong et al. 2024 (arXiv 2403.07691), eq. 4, 6
    and 7; beta is the paper's lambda. Rewards in metrics: beta · log P.
    """

    @property
    def sft_weight(self) -> float:
        return 1.0

    def of_pairs(self, pair: PairLogprobs) -> tuple[Tensor, Tensor, Tensor]:
        beta, chosen_P, rejected_P = self.config.beta, pair.chosen_mean_P, pair.rejected_mean_P
        log_odds_ratio_P = log_odds(chosen_P) - log_odds(rejected_P)
        return -beta * logsigmoid(log_odds_ratio_P), beta * chosen_P, beta * rejected_P


def log_odds(logprob_P: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p."""
    return logprob_P - log1mexp(logprob_P)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, accurate near 0 and far from it (Mächler 2012); finite, without gradient, at 0 itself."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
