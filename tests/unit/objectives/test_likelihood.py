"""Losses on single tokens: fine-tuning in its variants, classification by label words, and the terms that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.objectives.scored import logprobs, make_batch, make_scores
from tunesmith.config_objectives import ClassifyConfig, PretrainConfig, SftConfig
from tunesmith.objectives import build_objective
from tunesmith.objectives.terms import choice_accuracy, choice_loss, entropy, gated_by_entropy, smoothed, top_entropy
from tunesmith.types import Scores, Wanted

WEIGHTS = [[0.0, 0.5, 1.0], [0.0, 0.0, 2.0, 1.0, 0.0], [0.0, 1.0]]


def random_logits(rows: int = 4, vocabulary: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), torch.randint(vocabulary, (rows,), generator=generator)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    return found


def test_plain_likelihood_asks_for_nothing_more() -> None:
    for config in (SftConfig(), PretrainConfig()):
        objective = build_objective(config)
        assert objective.wanted == Wanted(is_likelihood=True)
        assert objective.reads == frozenset()
        batch = make_batch(WEIGHTS)
        scores = Scores(logprobs(batch).float())
        loss, metrics = objective.loss(scores, batch)
        assert torch.equal(loss, -(scores.logprobs_BT * batch.weights_BT).sum())
        assert metrics == {}
        assert objective.count(batch) == 5.5


def test_entropy_is_that_of_the_whole_distribution() -> None:
    logits, token = random_logits()
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits.log_softmax(-1), token, {}), expected)
    torch.testing.assert_close(entropy(torch.zeros(1, 8) - math.log(8), token, {}), torch.tensor([math.log(8)]))


def test_entropy_of_the_likeliest_goes_from_0_to_1() -> None:
    logits = torch.full((3, 50), -1000.0, dtype=torch.float64)
    logits[0, 3] = 0.0  # certain
    logits[1, :20] = 7.0  # twenty alike
    logits[2, :2] = 7.0  # two alike
    torch.testing.assert_close(top_entropy(logits), torch.tensor([0.0, 1.0, math.log(2) / math.log(20)]).double())
    torch.testing.assert_close(top_entropy(torch.zeros(1, 5)), torch.ones(1))  # a vocabulary of fewer than twenty


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_eaft_weighs_the_likelihood_by_the_entropy_and_not_its_gradient(power: float) -> None:
    logits, token = random_logits()
    top = logits.detach().sort(descending=True).values[:, :20].softmax(-1)
    gate = (-(top * top.log()).sum(-1) / math.log(20)) ** power
    nll = -logits.log_softmax(-1)[torch.arange(4), token]
    loss = gated_by_entropy(power)(logits, token, {})
    torch.testing.assert_close(loss, gate * nll)
    torch.testing.assert_close(gradient(loss, logits), gradient(gate * nll, logits))


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_smoothing_and_z_loss(label_smoothing: float, z_loss: float) -> None:
    logits, token = random_logits()
    target = torch.nn.functional.one_hot(token, 50) * (1 - label_smoothing) + label_smoothing / 50
    expected = -(target * logits.log_softmax(-1)).sum(-1) + z_loss * logits.exp().sum(-1).log() ** 2
    loss = smoothed(label_smoothing, z_loss)(logits, token, {})
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_the_loss_of_tokens_takes_the_place_of_their_likelihood() -> None:
    batch = make_batch(WEIGHTS)
    for config in (SftConfig(label_smoothing=0.1), SftConfig(loss="eaft"), PretrainConfig(z_loss=1e-4)):
        objective = build_objective(config)
        scores = make_scores(objective, batch)
        loss, metrics = objective.loss(scores, batch)
        assert scores.token_loss_BT is not None
        torch.testing.assert_close(loss, (scores.token_loss_BT * batch.weights_BT).sum())
        torch.testing.assert_close(metrics["nll"][0], -(scores.logprobs_BT * batch.weights_BT).sum())
        assert metrics["nll"][1] == 5.5


def test_the_routers_loss_is_a_mean_over_sequences_by_their_targets() -> None:
    batch = make_batch(WEIGHTS)
    scores = Scores(torch.zeros(batch.tokens_BT.shape), balance_N=torch.tensor([1.0, 2.0, 4.0]))
    objective = build_objective(SftConfig(router_loss=0.5))
    loss, metrics = objective.loss(scores, batch)
    assert objective.wanted.router
    assert loss / objective.count(batch) == pytest.approx(0.5 * (1.5 * 1 + 3 * 2 + 1 * 4) / 5.5)
    assert metrics["balance"].tolist() == [11.5, 5.5]


def test_noise_is_asked_for() -> None:
    objective = build_objective(SftConfig(neftune_alpha=5.0))
    assert objective.wanted == Wanted(embedding_noise=5.0, is_likelihood=True)
    assert objective.reads == {"embeddings"}


def test_choices_share_the_probability_among_themselves() -> None:
    logits, _ = random_logits(3)
    token = torch.tensor([7, 2, 9])
    columns = {"choices": torch.tensor([[7, 3, 5], [4, 2, -1], [0, 1, 9]])}
    expected = [
        -logits[row, choices].log_softmax(-1)[right]
        for row, choices, right in ((0, [7, 3, 5], 0), (1, [4, 2], 1), (2, [0, 1, 9], 2))
    ]
    loss = choice_loss(logits, token, columns)
    torch.testing.assert_close(loss, torch.stack(expected))
    grad = gradient(loss, logits)
    torch.testing.assert_close(grad, gradient(torch.stack(expected), logits))
    assert grad.isfinite().all()
    guesses = [
        max(choices, key=lambda v: logits[row, v].item()) for row, choices in enumerate(([7, 3, 5], [4, 2], [0, 1, 9]))
    ]
    assert choice_accuracy(logits, token, columns).tolist() == [
        float(g == t) for g, t in zip(guesses, token, strict=True)
    ]


def test_a_filled_up_choice_is_never_the_likeliest() -> None:
    logits = torch.tensor([[9.0, 0.0, 1.0]])  # token 0 stands for -1 where it is looked up
    columns = {"choices": torch.tensor([[1, 2, -1]])}
    assert choice_accuracy(logits, torch.tensor([2]), columns).tolist() == [1.0]


def test_classification_is_a_mean_over_sequences() -> None:
    batch = make_batch([[0.0, 0.0, 1.0], [0.0, 1.0], [0.0, 0.0, 0.0, 1.0]], [[0, 1], [2]])
    objective = build_objective(ClassifyConfig())
    scores = make_scores(objective, batch)
    loss, metrics = objective.loss(scores, batch)
    assert objective.count(batch) == 3
    torch.testing.assert_close(loss, scores.token_loss_BT.sum())  # type: ignore[union-attr]
    assert metrics["accuracy"][1] == 3


TERMS: list[Callable[..., Any]] = [
    entropy,
    gated_by_entropy(1.0),
    smoothed(0.1, 1e-4),
]


@pytest.mark.parametrize("term", TERMS)
def test_terms_do_not_depend_on_how_targets_are_put_together(term: Callable[..., Tensor]) -> None:
    logits, token = random_logits(6)
    parts = torch.cat([term(logits[part], token[part], {}) for part in (slice(0, 1), slice(1, 4), slice(4, 6))])
    torch.testing.assert_close(parts, term(logits, token, {}))
