"""The table of optimizers, torch's own where it has one. No weight decay on norms, biases and other vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.tensors import mesh_of

Groups = list[dict[str, Any]]


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): p ← p - lr (sign(β₁ m + (1-β₁) g) + λ p); m ← β₂ m + (1-β₂) g."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                direction = torch.lerp(p.grad, momentum, beta1).sign_()
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * direction)
                momentum.lerp_(p.grad, 1 - beta2)


def _adamw(groups: Groups, config: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)]


def _adamw8bit(groups: Groups, config: Any) -> list[torch.optim.Optimizer]:
    from torchao.optim import AdamW8bit

    return [AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)]


def _sgd(groups: Groups, config: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)]


def _adafactor(groups: Groups, config: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adafactor(groups, lr=config.lr)]


def _lion(groups: Groups, config: Any) -> list[torch.optim.Optimizer]:
    return [Lion(groups, lr=config.lr, betas=config.betas, weight_decay=0.0)]


def _muon(groups: Groups, config: Any) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of blocks, with its step scaled to AdamW's (match_rms_adamw), and AdamW on the rest."""
    matrices = _only(groups, lambda name, p: p.ndim == 2 and _in_a_block(name))
    rest = _only(groups, lambda name, p: not (p.ndim == 2 and _in_a_block(name)))
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        muon = {"lr": config.lr, "momentum": config.momentum, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}
        optimizers.append(torch.optim.Muon(matrices, **muon))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, fused=True))
    return optimizers


def _in_a_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _only(groups: Groups, wanted: Callable[[str, nn.Parameter], bool]) -> Groups:
    kept = [{**group, "params": [(n, p) for n, p in group["params"] if wanted(n, p)]} for group in groups]
    return [group for group in kept if group["params"]]


OPTIMIZERS: dict[str, Callable[[Groups, Any], list[torch.optim.Optimizer]]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "muon": _muon,
    "lion": _lion,
}

STATE_BYTES_PER_ELEMENT: dict[str, Callable[[Any, str, int], float]] = {
    "adamw": lambda config, name, size: 2 * size,
    "adamw8bit": lambda config, name, size: 2 * (1 + 4 / 256),  # a byte each, and an fp32 scale per block of 256
    "sgd": lambda config, name, size: size if config.momentum else 0,
    "adafactor": lambda config, name, size: 0,  # a row and a column per matrix: nothing beside the weights
    "muon": lambda config, name, size: size if _in_a_block(name) else 2 * size,
    "lion": lambda config, name, size: size,
}
"""(config, parameter's name, bytes per element of the parameter) → bytes of state per element."""


class Optimizer:
    """One or several torch optimizers that step together under one learning rate."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    def step(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's, so that a compiled step does not see a new number
                    group["lr"].fill_(lr * group["lr_multiple"])
                else:
                    group["lr"] = lr * group["lr_multiple"]
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """Of each part the state by the parameters' names: how they are numbered and grouped is the ranks' business."""
        return [{name: part.state[p] for name, p in _named(part).items() if p in part.state} for part in self.parts]

    def load_state_dict(self, saved: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, saved, strict=True):
            numbered = {n: state[name] for n, name in enumerate(_named(part)) if name in state}
            part.load_state_dict({"state": numbered, "param_groups": part.state_dict()["param_groups"]})


def build_optimizer(config: Any, params: Mapping[str, Tensor], lr_multiple: Callable[[str], float]) -> Optimizer:
    """The optimizer that the config names, over named parameters; groups by weight decay, learning-rate multiple and the ranks
    over which parameters are cut, since torch updates those of a group together."""
    grouped: dict[tuple[float, float, Any], list[tuple[str, Tensor]]] = {}
    for name, p in params.items():
        decay = config.weight_decay if p.ndim >= 2 else 0.0
        grouped.setdefault((decay, lr_multiple(name), mesh_of(p)), []).append((name, p))
    groups: Groups = [
        {"params": members, "weight_decay": decay, "lr_multiple": multiple}
        for (decay, multiple, _), members in grouped.items()
    ]
    return Optimizer(OPTIMIZERS[config.name](groups, config))


def optimizer_bytes(config: Any, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of state for parameters of the given (elements, bytes per element)."""
    per_element = STATE_BYTES_PER_ELEMENT[config.name]
    return round(sum(elements * per_element(config, name, size) for name, (elements, size) in shapes.items()))


def _named(part: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters by name, in the order in which torch numbers them."""
    return {
        name: p for group in part.param_groups for name, p in zip(group["param_names"], group["params"], strict=True)
    }
