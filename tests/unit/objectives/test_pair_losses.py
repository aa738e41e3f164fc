"""Each loss of the DPO family and its gradient against the formula written down once more, for one pair and in plain floats."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from tunesmith.config_objectives import DpoConfig, PairLoss
from tunesmith.objectives.pair_losses import F_DIVERGENCES, PAIR_LOSSES, PairScores

# log-probabilities of chosen and rejected under the model, then under the reference
PAIRS = [(-5.0, -7.5, -6.0, -6.5), (-9.0, -4.0, -8.0, -4.5), (-3.0, -3.0, -3.0, -3.0), (-20.0, -22.5, -23.0, -20.0)]
LENGTHS = (4.0, 7.0)
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot")
MATCHED = 0.7


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def score(ratio: float, config: DpoConfig) -> float:
    t, a = math.exp(ratio), config.alpha_divergence
    return {
        "reverse_kl": ratio,
        "forward_kl": 1 - 1 / t,
        "js": math.log(2 * t / (t + 1)),
        "alpha": (1 - t**-a) / a,
    }[config.f_divergence]


def formula(name: str, config: DpoConfig, c: float, r: float, rc: float, rr: float) -> float:
    """The loss of one pair."""
    beta, e = config.beta, config.label_smoothing
    ratio_c, ratio_r = c - rc, r - rr
    s_c, s_r = score(ratio_c, config), score(ratio_r, config)
    x, per_token = beta * (s_c - s_r), s_c / LENGTHS[0] - s_r / LENGTHS[1]
    reward_c, reward_r = beta * ratio_c, beta * ratio_r

    def cross_entropy(y: float) -> float:
        return -(1 - e) * log_sigmoid(y) - e * log_sigmoid(-y)

    if name == "exo_pair":
        p = sigma(x)
        return p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e)
    if name == "discopop":
        share = sigma(x / config.discopop_tau)
        return (1 - share) * -log_sigmoid(x) + share * math.exp(-x)
    return {
        "sigmoid": cross_entropy(x),
        "sigmoid_norm": cross_entropy(beta * per_token),
        "hinge": max(0.0, 1 - x),
        "ipo": (per_token - 1 / (2 * beta)) ** 2,
        "nca_pair": -log_sigmoid(reward_c) - (log_sigmoid(-reward_c) + log_sigmoid(-reward_r)) / 2,
        "robust": ((1 - e) * -log_sigmoid(x) - e * -log_sigmoid(-x)) / (1 - 2 * e),
        "bco_pair": -log_sigmoid(reward_c) - log_sigmoid(-reward_r),
        "sppo_hard": (ratio_c - 1 / (2 * beta)) ** 2 + (ratio_r + 1 / (2 * beta)) ** 2,
        "aot": cross_entropy(beta * (c - r - MATCHED)),
        "apo_zero": 1 - sigma(reward_c) + sigma(reward_r),
        "apo_down": sigma(reward_c) + 1 - sigma(reward_c - reward_r),
    }[name]


def scores(
    config: DpoConfig, pairs: list[tuple[float, float, float, float]], dtype: torch.dtype = torch.float64
) -> Any:
    columns = torch.tensor(pairs, dtype=dtype).T
    leaves = [columns[0].clone().requires_grad_(), columns[1].clone().requires_grad_()]
    lengths = [torch.full((len(pairs),), length, dtype=dtype) for length in LENGTHS]
    matched = torch.full((len(pairs),), MATCHED, dtype=dtype)
    return PairScores(*leaves, columns[2], columns[3], *lengths, config, matched), leaves


def configs() -> list[tuple[str, DpoConfig]]:
    plain = {name: {"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {} for name in PAIR_LOSSES}
    found = [(name, DpoConfig(loss=name, beta=0.3, **plain[name])) for name in PAIR_LOSSES]
    found += [(name, DpoConfig(loss=name, beta=0.3, label_smoothing=0.2)) for name in SMOOTHED]
    for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "discopop"):
        found += [(name, DpoConfig(loss=name, beta=0.3, f_divergence=f)) for f in F_DIVERGENCES]
    return found


@pytest.mark.parametrize(("name", "config"), configs())
def test_loss_and_gradient_are_those_of_the_formula(name: str, config: DpoConfig) -> None:
    pair, leaves = scores(config, PAIRS)
    loss = PAIR_LOSSES[name](pair)
    expected = torch.tensor([formula(name, config, *numbers) for numbers in PAIRS], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)

    loss.sum().backward()
    step = 1e-5
    for k, leaf in enumerate(leaves):
        for n, numbers in enumerate(PAIRS):
            up, down = list(numbers), list(numbers)
            up[k] += step
            down[k] -= step
            slope = (formula(name, config, *up) - formula(name, config, *down)) / (2 * step)
            grad = 0.0 if leaf.grad is None else leaf.grad[n].item()
            assert grad == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_every_name_of_the_configuration_has_a_loss() -> None:
    assert set(PAIR_LOSSES) == set(get_args(PairLoss))
    assert set(F_DIVERGENCES) == set(get_args(DpoConfig.model_fields["f_divergence"].annotation))


def test_alpha_lies_between_reverse_and_forward_kl() -> None:
    ratio = torch.linspace(-3, 3, 7, dtype=torch.float64)
    forward = DpoConfig(f_divergence="alpha", alpha_divergence=1.0)
    torch.testing.assert_close(F_DIVERGENCES["alpha"](ratio, forward), F_DIVERGENCES["forward_kl"](ratio, forward))
    reverse = DpoConfig(f_divergence="alpha", alpha_divergence=1e-5)
    torch.testing.assert_close(F_DIVERGENCES["alpha"](ratio, reverse), ratio, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "config"), configs())
def test_far_pairs_stay_finite_in_fp32(name: str, config: DpoConfig) -> None:
    far = [(-10.0, -2000.0, -500.0, -600.0), (-2000.0, -10.0, -600.0, -500.0)]
    pair, leaves = scores(config, far, torch.float32)
    loss = PAIR_LOSSES[name](pair).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)
