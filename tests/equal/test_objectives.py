"""For every objective: the update does not depend on micro-batches, packing, or whether a prompt is shared; fp64, to 1e-9."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.config import RunConfig
from tunesmith.objectives import OBJECTIVES
from tunesmith.run import Run, build
from tunesmith.types import Batch

BOUND = 1e-9
SHARED_BOUND = 1e-7
"""Norms work in fp32 whatever the dtype: the gradient of a shared prompt is rounded there once, of two prompts twice."""


@pytest.fixture
def run(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]], request: Any
) -> Run:
    """A run in fp64 whose adapter is no longer where it began, so that model and reference differ. What has no gradient is
    scored along directions."""
    sections = objective_sections(request.param)
    method: dict[str, Any] = {"name": "lora", "rank": 4}
    if OBJECTIVES[request.param].no_gradient:
        method = {"name": "zeroth", "queries": 3, "eps": 1e-2}
        sections["optimizer"] = {"name": "sgd"}
    config = make_config(**sections, method=method, train={"batch_size": 12})
    run = build(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 1e-30})}))
    run.learner.model.double()
    for helper in run.helpers.values():
        if model := getattr(helper, "model", None):
            model.double()
    if run.objective.no_gradient:
        return run
    generator = torch.Generator().manual_seed(0)
    for p in run.learner.method.params.values():
        p.data = p.data + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return run


def update(run: Run, micro_batch_tokens: int, **layout: bool) -> dict[str, Tensor]:
    """Gradients (or slopes along directions) and metrics of one step that is not taken."""
    learner = run.learner
    learner.micro_batch_tokens = micro_batch_tokens
    (ready,) = run.objective.prepare(replace(run.data, **layout)(0), run.helpers)
    before = run.objective.state_dict()
    metrics = learner.step(run.objective, ready, lr=1e-30)
    run.objective.load_state_dict(before)
    found = {name: p.grad.clone() for name, p in learner.method.params.items() if p.grad is not None}
    if updates := getattr(learner.method, "updates", None):
        found["slopes"] = torch.tensor(updates.pop().coefficients, dtype=torch.float64) * 1e30
    return found | {f"metric {name}": value for name, value in metrics.items() if name != "tokens"}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def sequences_of(batch: Batch) -> list[tuple[int, list[int], list[float]]]:
    """(sample, tokens, weights) of every sequence, in an order of their own."""
    found = zip(batch.sample_N.tolist(), batch.sequences(), strict=True)
    return sorted((sample, tokens.tolist(), weights.tolist()) for sample, (tokens, weights) in found)


@pytest.mark.parametrize("run", OBJECTIVES, indirect=True)
def test_the_update_is_the_same_however_the_batch_lies(run: Run) -> None:
    whole = update(run, 10**6, pack=False, share=False)
    assert max(float(value.abs().max()) for name, value in whole.items() if "metric" not in name) > 1e-4
    rows = len(replace(run.data, pack=False)(0).tokens_BT)
    assert rows >= 12
    for tokens in (1, 100, 300):
        assert difference(whole, update(run, tokens, pack=False, share=False)) < BOUND, f"micro-batches of {tokens}"
    assert difference(whole, update(run, 10**6, pack=True, share=False)) < BOUND, "packed"
    assert difference(whole, update(run, 200, pack=True, share=True)) < SHARED_BOUND, "packed and shared, in pieces"


@pytest.mark.parametrize("run", [name for name, kind in OBJECTIVES.items() if kind.form == "pairs"], indirect=True)
def test_a_shared_prompt_gives_the_same_update_from_fewer_tokens(run: Run) -> None:
    assert run.share
    apart, shared = (replace(run.data, share=share)(0) for share in (False, True))
    assert shared.num_tokens() < 0.8 * apart.num_tokens()
    assert len(shared.tokens_BT) == len(apart.tokens_BT) // 2
    assert sequences_of(apart) == sequences_of(shared)
    assert (
        difference(update(run, 10**6, pack=False, share=False), update(run, 10**6, pack=False, share=True))
        < SHARED_BOUND
    )


@pytest.mark.parametrize("run", [name for name, kind in OBJECTIVES.items() if kind.form == "pairs"], indirect=True)
def test_a_pair_never_parts(run: Run) -> None:
    for pack in (False, True):
        for share in (False, True):
            batch = replace(run.data, pack=pack, share=share)(0)
            for piece in batch.split(1):
                here = piece.sequence_BT[piece.sequence_BT >= 0].unique()
                assert batch.group_N[here].bincount().unique().tolist() in ([0, 2], [2])
