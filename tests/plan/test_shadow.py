"""Tensors without numbers, and the ledger that counts them and others alike."""

from __future__ import annotations

import torch

from tests.families import make_model
from tunesmith.phases import phase, watching
from tunesmith.plan.ledger import Ledger
from tunesmith.plan.shadow import Shadow


def test_hollow_tensors_take_no_memory_and_what_comes_of_them_is_hollow() -> None:
    shadow, ledger = Shadow(), Ledger()
    weight = shadow.hollow(torch.empty(2**20, 2**20, device="meta"))  # 4 TiB
    with shadow, ledger:
        product = weight @ torch.zeros(2**20, 2)
        assert product.shape == (2**20, 2)
        assert torch.isfinite(product.sum())  # code that asks goes on
    assert ledger.peaks[""].bytes >= 4 * 2**21


def test_integers_stay_real_inside() -> None:
    with Shadow():
        ids = torch.arange(6).view(2, 3)
        assert (ids % 2 == 0).nonzero().tolist() == [[0, 0], [0, 2], [1, 1]]
        assert ids.cumsum(-1)[1].tolist() == [3, 7, 12]


def test_experts_get_tokens_in_turn() -> None:
    shadow = Shadow()
    logits = shadow.hollow(torch.empty(6, 4, device="meta"))
    with shadow:
        _, chosen = logits.softmax(-1).topk(2)
        assert chosen.flatten().bincount(minlength=4).tolist() == [3, 3, 3, 3]


def test_tied_weights_stay_tied() -> None:
    model = make_model("qwen3")
    shadow = Shadow()
    shadow.hollow_out(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_ledger_knows_what_lives_and_what_for() -> None:
    ledger = Ledger()
    weight = torch.ones(1000, requires_grad=True)
    ledger.name([weight], "weights")
    with ledger, watching(ledger.during):
        with phase("forward"):
            squares = weight * weight  # kept
            (weight + 1).sum()  # gone at once
        with phase("backward"):
            (gradient,) = torch.autograd.grad(squares.sum(), weight)
        del squares
        with phase("update"):
            pass
    assert ledger.peaks["forward"].bytes == 4 * 3000 + 4
    assert ledger.peaks["forward"].kinds["weights"] == 4000
    assert ledger.held["backward pass"] == 4000
    assert ledger.peaks["update"].bytes == 8000 == ledger.total
    del gradient
    assert ledger.total == 4000


def test_views_and_changes_in_place_are_no_new_memory() -> None:
    ledger = Ledger()
    with ledger:
        x = torch.zeros(8, 8)
        x.view(64)[3:].add_(1)
        x.t().mul_(2)
    assert ledger.peaks[""].bytes == 256


def test_products_are_counted_as_two_operations_a_number() -> None:
    ledger = Ledger()
    with ledger:
        torch.ones(3, 5) @ torch.ones(5, 7)
    assert ledger.flops == 2 * 3 * 5 * 7
