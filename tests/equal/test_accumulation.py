"""The update does not depend on micro-batches, packing or padding: gradients in fp64, equal to 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.batches import left_padded, ragged_batch
from tests.families import ISOLATING, make_model
from tunesmith.config import FullConfig, SftConfig, SgdConfig, SingleConfig
from tunesmith.engines import build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS
from tunesmith.objectives import build_objective
from tunesmith.types import Batch

SOME = ["llama", "gemma3_text", "gpt2", "qwen3_moe"]

BOUND = {"gemma2": 1e-7, "gemma3_text": 1e-7, "cohere": 1e-8}
"""1e-10, but for models whose own code sums in fp32 whatever their dtype."""


def gradients(family: str, batch: Batch, micro_batch_tokens: int, mean_of_means: bool = False) -> dict[str, Tensor]:
    """Gradients of one step, and the loss, under an SGD step that is not taken."""
    method = METHODS["full"](FullConfig(), SgdConfig(lr=1e-30), max_grad_norm=None)
    engine = build_engine(SingleConfig(device="cpu"), "fp32")
    learner = Learner(make_model(family, torch.float64), engine, method, micro_batch_tokens)
    objective = build_objective(SftConfig())
    if mean_of_means:
        _average_each_micro_batch(objective, len(batch.split(micro_batch_tokens)))
    metrics = learner.step(objective, batch, lr=1e-30)
    grads = {name: p.grad for name, p in method.params.items() if p.grad is not None}
    return {**grads, "loss": metrics["loss"]}


def _average_each_micro_batch(objective: Any, pieces: int) -> None:
    """The mistake that the design forbids, for the control."""
    total_loss, count = objective.loss, objective.count
    objective.count = lambda batch: torch.tensor(1.0)
    objective.loss = lambda scores, batch: (total_loss(scores, batch)[0] / count(batch) / pieces, {})


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_micro_batches_do_not_matter(family: str, pack: bool) -> None:
    batch = ragged_batch(pack, shortest=10)
    width = batch.tokens_BT.shape[1]
    assert [len(batch.split(rows * width)) for rows in (8, 4, 2, 1)] == [1, 2, 4, 8]
    whole = gradients(family, batch, 8 * width)
    for rows in (4, 2, 1):
        assert difference(whole, gradients(family, batch, rows * width)) < BOUND.get(family, 1e-10)


def test_the_comparison_would_see_a_mean_of_means() -> None:
    batch = ragged_batch(pack=False)
    wrong = gradients("llama", batch, 24, mean_of_means=True)
    assert difference(gradients("llama", batch, 10**6), wrong) > 1e-3


@pytest.mark.parametrize("family", sorted(ISOLATING))
def test_packed_equals_unpacked(family: str) -> None:
    packed, padded = ragged_batch(pack=True), ragged_batch(pack=False)
    assert len(packed.tokens_BT) < len(padded.tokens_BT)
    assert difference(gradients(family, packed, 10**6), gradients(family, padded, 10**6)) < BOUND.get(family, 1e-10)


@pytest.mark.parametrize("family", SOME)
def test_padding_side_does_not_matter(family: str) -> None:
    padded = ragged_batch(pack=False)
    moved = left_padded(padded)
    assert (moved.sequence_BT[:, -1] >= 0).all()
    assert difference(gradients(family, padded, 10**6), gradients(family, moved, 10**6)) < BOUND.get(family, 1e-10)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    batch = ragged_batch(pack=True)
    plain = gradients("llama", batch, 10**6)
    method = METHODS["full"](FullConfig(), SgdConfig(lr=1e-30), max_grad_norm=None)
    engine = build_engine(SingleConfig(device="cpu", activation_checkpointing=True), "fp32")
    learner = Learner(make_model("llama", torch.float64), engine, method, 10**6)
    metrics = learner.step(build_objective(SftConfig()), batch, lr=1e-30)
    grads = {name: p.grad for name, p in method.params.items()}
    assert difference(plain, {**grads, "loss": metrics["loss"]}) < 1e-12
