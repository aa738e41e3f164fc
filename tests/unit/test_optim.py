"""Optimizers against formulas and torch, the decay rule, and the bytes that they declare."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import make_model
from tunesmith.config import AdamW8bitConfig, AdamWConfig, LionConfig, MuonConfig, SgdConfig
from tunesmith.config_file import config_from_dict
from tunesmith.methods.optim import OPTIMIZERS, build_optimizer, optimizer_bytes


def parameters(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    made = {f"model.layers.{i}.weight": nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}
    for p in made.values():
        p.grad = torch.randn_like(p)
    return made


def test_lion_is_algorithm_2_of_its_paper() -> None:
    params = parameters((3, 4))
    p = next(iter(params.values()))
    optimizer = build_optimizer(LionConfig(lr=1.0, weight_decay=0.1, betas=(0.9, 0.99)), params, lambda name: 1.0)
    theta, momentum = p.detach().clone(), torch.zeros(3, 4)
    for lr in (0.01, 0.02, 0.005):
        grad = torch.randn(3, 4)
        p.grad = grad.clone()
        optimizer.step(lr)
        theta = theta - lr * (torch.sign(0.9 * momentum + 0.1 * grad) + 0.1 * theta)
        momentum = 0.99 * momentum + 0.01 * grad
        torch.testing.assert_close(p.detach(), theta)


def test_vectors_do_not_decay_and_multiples_hold() -> None:
    params = parameters((3, 4), (3,))
    for p in params.values():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params.values()]
    config = AdamWConfig(lr=1.0, weight_decay=0.5)
    build_optimizer(config, params, lambda name: 2.0).step(0.01)
    matrix, vector = (p.detach() for p in params.values())
    torch.testing.assert_close(matrix, before[0] * (1 - 0.01 * 2.0 * 0.5))
    assert torch.equal(vector, before[1])


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    model = make_model("llama")
    params = dict(model.named_parameters())
    muon, adamw = build_optimizer(MuonConfig(lr=1e-3), params, lambda name: 1.0).parts
    names = {id(p): name for name, p in params.items()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {name for name, p in params.items() if ".layers." in name and p.ndim == 2}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert taken | rest == set(params)
    assert not taken & rest


def state_bytes(tree: Any) -> int:
    if isinstance(tree, Tensor):
        return tree.untyped_storage().nbytes() if tree.numel() > 1 else 0
    if isinstance(tree, dict):
        return sum(state_bytes(value) for value in tree.values())
    return sum(state_bytes(value) for value in tree) if isinstance(tree, list | tuple) else 0


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw8bit"])
def test_declared_bytes_are_the_bytes_held(name: str) -> None:
    model = make_model("llama")
    params = dict(model.named_parameters())
    for p in params.values():
        p.grad = torch.randn_like(p)
    tree = {"model": "m", "data": "d", "output": "o", "optimizer": {"name": name, "lr": 1e-3}}
    config = config_from_dict(tree).optimizer
    optimizer = build_optimizer(config, params, lambda name: 1.0)
    optimizer.step(1e-3)
    shapes = {name: (p.numel(), p.element_size()) for name, p in params.items()}
    held = sum(state_bytes(part.state[p]) for part in optimizer.parts for p in params.values() if p in part.state)
    weights = sum(elements * size for elements, size in shapes.values())
    # adafactor keeps a row and a column per matrix: little beside the weights but for tiny models
    assert abs(held - optimizer_bytes(config, shapes)) <= (0.15 if name == "adafactor" else 0.01) * weights


@pytest.mark.skipif(not shutil.which("g++"), reason="torchao compiles its step, which needs a C++ compiler on the CPU")
def test_8_bit_adamw_follows_adamw() -> None:
    paths = []
    for config in (AdamWConfig(lr=1.0), AdamW8bitConfig(lr=1.0)):
        torch.manual_seed(0)
        params = parameters((64, 128))
        p = next(iter(params.values()))
        optimizer = build_optimizer(config, params, lambda name: 1.0)
        for _ in range(3):
            optimizer.step(0.01)
        paths.append(p.detach().clone())
    torch.manual_seed(0)
    start = next(iter(parameters((64, 128)).values()))
    assert (paths[0] - paths[1]).norm() < 0.05 * (paths[0] - start.detach()).norm()
    shapes = {"p": (64 * 128, 4)}
    assert optimizer_bytes(AdamW8bitConfig(lr=1.0), shapes) < 0.3 * optimizer_bytes(AdamWConfig(lr=1.0), shapes)


def test_sgd_without_momentum_holds_nothing() -> None:
    params = parameters((3, 4))
    optimizer = build_optimizer(SgdConfig(lr=1.0), params, lambda name: 1.0)
    p = next(iter(params.values()))
    expected = p.detach() - 0.1 * p.grad
    optimizer.step(0.1)
    assert torch.equal(p.detach(), expected)
    assert optimizer_bytes(SgdConfig(lr=1.0), {"p": (12, 4)}) == 0
