"""No objective's loss depends on how a batch is cut, packed, padded, or whether pairs share their beginning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.objectives.scored import PAIR_WEIGHTS, make_batch, make_scores, part_of, prepared, ragged_weights
from tunesmith.config_objectives import (
    AnswerConfig,
    BcoConfig,
    ClassifyConfig,
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PretrainConfig,
    PrmConfig,
    RewardConfig,
    SftConfig,
    SimpoConfig,
)
from tunesmith.objectives import OBJECTIVES, Objective, build_objective
from tunesmith.types import Batch

SINGLE_WEIGHTS = [[0.0, 0.5, 1.0, 0.0, 2.0], *ragged_weights((9, 4, 12, 6, 7), (3, 1, 5, 2, 6))]
STEP_WEIGHTS = [[0, 0, 1, 0, -1], [0, 1, 0, 1], [0, 0, 0, -1], [0, 1, 1, 1, 0, 0, -1.0], [0, 1], [0, 0, 0, 0, 1]]
CHOICE_WEIGHTS = [[0.0] * (n + 1) + [1.0] for n in (3, 5, 2, 6, 4, 4)]

CONFIGS: dict[str, list[Any]] = {
    "sft": [
        SftConfig(),
        SftConfig(loss="dft"),
        SftConfig(loss="eaft"),
        SftConfig(label_smoothing=0.1, z_loss=1e-4),
        SftConfig(router_loss=0.01),
    ],
    "pretrain": [PretrainConfig(), PretrainConfig(z_loss=1e-4, router_loss=0.1)],
    "dpo": [
        DpoConfig(),
        DpoConfig(loss="aot", beta=0.5),
        DpoConfig(loss={"sigmoid": 0.8, "bco_pair": 0.2}, sft_weight=1.0, ld_alpha=0.3),
        DpoConfig(loss=["ipo", "sigmoid_norm", "aot"], ld_alpha=0.3),
    ],
    "orpo": [OrpoConfig()],
    "simpo": [SimpoConfig(sft_weight=0.1)],
    "cpo": [CpoConfig(), CpoConfig(loss="ipo"), CpoConfig(loss="hinge")],
    "kto": [KtoConfig(), KtoConfig(loss="apo_zero_unpaired", desirable_weight=1.5)],
    "bco": [BcoConfig()],
    "reward": [RewardConfig(center=0.01)],
    "prm": [PrmConfig()],
    "classify": [ClassifyConfig(), ClassifyConfig(loss="accuracy")],
    "answer": [AnswerConfig(), AnswerConfig(metric="exact_match")],
}
CELLS = [
    pytest.param(config, id=f"{name}-{k}") for name, configs in CONFIGS.items() for k, config in enumerate(configs)
]


def layouts(objective: Objective) -> dict[str, Batch]:
    """The same sequences in several ways."""
    labels = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    if objective.form == "pairs":
        labels = [0.2, 0.2, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5]
        rows = [[0, 1, 2, 3], [4, 5], [6, 7]]
        return {
            "padded": make_batch(PAIR_WEIGHTS, group_size=2, labels=labels),
            "packed": make_batch(PAIR_WEIGHTS, rows, 2, labels=labels),
            "shared": make_batch(PAIR_WEIGHTS, rows, 2, shared=1, labels=labels),
        }
    weights: Any = {"steps": STEP_WEIGHTS, "choices": CHOICE_WEIGHTS}.get(objective.form, SINGLE_WEIGHTS)
    return {
        "padded": make_batch(weights, labels=labels),
        "packed": make_batch(weights, [[0, 1, 2], [3], [4, 5]], labels=labels),
    }


def total(
    objective: Objective, batch: Batch, budget: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """(loss, metrics, gradients by name, count) over micro-batches of at most so many tokens."""
    ready = prepared(objective, batch)
    whole = make_scores(objective, ready)
    loss, metrics, count, start = torch.zeros((), dtype=torch.float64), {}, torch.zeros(()), 0
    for piece in ready.split(budget):
        part, found = objective.loss(part_of(whole, start, piece), piece)
        loss, count = loss + part, count + objective.count(piece)
        metrics = {name: metrics.get(name, 0.0) + value for name, value in found.items()}
        start += len(piece.tokens_BT)
    if not objective.no_gradient:
        loss.backward()
    leaves = {"logprobs": whole.logprobs_BT, "losses": whole.token_loss_BT, "values": whole.values_BTC}
    grads = {
        name: by_token(leaf.grad, ready) for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None
    }
    return loss.detach(), metrics, grads, count


def by_token(grad: Tensor, batch: Batch) -> Tensor:
    """[N, positions, …], whatever the layout."""
    here = batch.sequence_BT >= 0
    found = torch.zeros(len(batch.sample_N), 16, *grad.shape[2:], dtype=grad.dtype)
    found[batch.sequence_BT[here], batch.positions_BT[here]] = grad[here]
    return found


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("config", CELLS)
def test_loss_gradient_metrics_and_count_are_those_of_the_whole(config: Any) -> None:
    objective = build_objective(config)
    found = layouts(objective)
    loss, metrics, grads, count = total(objective, found["padded"], 10**6)
    assert count > 0
    assert bool(grads) != bool(objective.no_gradient)
    assert loss.isfinite()
    for batch in found.values():
        for budget in (1, 24, 10**6):
            other = total(objective, batch, budget)
            torch.testing.assert_close(other[0], loss, rtol=1e-9, atol=1e-9)
            same_bco = {name: value for name, value in other[1].items() if name not in ("kl", "delta")}
            assert_same(same_bco, {name: value for name, value in metrics.items() if name not in ("kl", "delta")})
            assert_same(other[2], grads)
            assert other[3] == count
            for name in {"kl", "delta"} & metrics.keys():  # per batch, so that each micro-batch says the same
                quotients = [x[name][0] / x[name][1] for x in (other[1], metrics)]
                torch.testing.assert_close(*quotients, rtol=1e-9, atol=1e-9)


def test_every_objective_is_tested() -> None:
    assert set(CONFIGS) == set(OBJECTIVES) - {"distill"}


@pytest.mark.parametrize("config", CELLS)
def test_the_gradient_follows_the_weights_where_it_is_said_to(config: Any) -> None:
    objective = build_objective(config)
    if not objective.wanted.is_likelihood:
        return
    batch = layouts(objective)["packed"]
    scores = make_scores(objective, batch)
    objective.loss(scores, batch)[0].backward()
    leaf = scores.logprobs_BT if scores.token_loss_BT is None else scores.token_loss_BT
    sign = -1 if scores.token_loss_BT is None else 1
    assert torch.equal(leaf.grad, sign * batch.weights_BT.double())  # type: ignore[arg-type]


@pytest.mark.parametrize("config", CELLS)
def test_what_is_read_is_what_is_wanted(config: Any) -> None:
    objective = build_objective(config)
    wanted = objective.wanted
    needs_logits = wanted.token_loss is not None or bool(wanted.observed)
    reads = {
        "logits": needs_logits and not wanted.among,
        "choices": needs_logits and bool(wanted.among),
        "values": wanted.values,
        "router": wanted.router,
        "embeddings": wanted.embedding_noise > 0,
        "generated": wanted.generate is not None,
    }
    assert objective.reads == {name for name, is_read in reads.items() if is_read}
    assert objective.head == ("language" if not wanted.values else objective.head)
    assert (objective.num_labels > 0) == wanted.values
