"""Rows of a parameter while they train: their gradient, their master copy, their optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.methods.optim import build_optimizer
from tunesmith.methods.partition import Span
from tunesmith.models.slices import train_rows
from tunesmith.tensors import mesh_of


class Trainee:
    """The rows of a span, from its turn's beginning to its end. `state`: what it had learnt before, as `state()` gave it."""

    leaf: nn.Parameter
    """Collects the gradient: the parameter itself, or rows that share its memory."""
    master: nn.Parameter
    """What the optimizer changes: the leaf, or of 16-bit weights an fp32 copy."""
    stop: Callable[[], None]
    """Ends the collecting."""

    def __init__(
        self,
        model: Any,
        p: nn.Parameter,
        span: Span,
        state: Mapping[str, Tensor],
        optimizer_config: Any,
        stochastic: bool,
    ) -> None:
        self.span, self.stochastic = span, stochastic
        if span.stop - span.start == num_rows(p):
            p.requires_grad_(True)
            self.leaf = p
            self.stop = cast(Callable[[], None], partial(_stand_still, p))
        else:
            self.leaf, self.stop = train_rows(model, p, span.start, span.stop)
        moments = {name: x for name, x in state.items() if name != "master"}
        self.master = self.leaf
        if self.leaf.element_size() < 4:
            self.master = nn.Parameter(state["master"] if "master" in state else self.leaf.detach().float())
        self.optimizer = build_optimizer(optimizer_config, {span.name: self.master}, lambda _: 1.0)
        if moments:
            self.optimizer.parts[0].state[self.master] = moments
        if self.has_copy and stochastic:
            self._let_copy_go()

    @property
    def has_copy(self) -> bool:
        """Whether the optimizer works on a copy of the weights."""
        return self.master is not self.leaf

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state for these rows, and the master copy."""
        state = dict(self.optimizer.parts[0].state.get(self.master, {}))
        if self.has_copy and not self.stochastic:
            state["master"] = self.master.detach()
        return state

    def expect(self, several: bool) -> None:
        """Prepare for the gradients of one micro-batch, or of several: their sum is no 16-bit number, unless FSDP makes it."""
        self.leaf.grad = None
        if self.has_copy:
            self.leaf.grad_dtype = torch.float32 if several and mesh_of(self.leaf) is None else self.leaf.dtype

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """One step of the optimizer."""
        if self.leaf.grad is None:
            return
        if not self.has_copy:
            self.optimizer.step(lr)
            return
        if self.stochastic:
            self.master.data = self.leaf.detach().float()
        self.master.grad = self.leaf.grad.float()
        self.leaf.grad = None
        self.optimizer.step(lr)
        self.master.grad = None
        self.leaf.copy_(stochastic_bf16(self.master) if self.stochastic else self.master)
        if self.stochastic:
            self._let_copy_go()

    def _let_copy_go(self) -> None:
        """Without a master copy, one is made for the moment of an update."""
        self.master.data = self.master.data.new_empty(0)


def stochastic_bf16(x: Tensor) -> Tensor:
    """fp32 rounded to one of the two nearest bf16 numbers at random, in proportion to how near: right on average."""
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device)
    return (x.detach().view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


def num_rows(p: Tensor) -> int:
    """Of the first dimension; a single number is a row."""
    return len(p) if p.ndim else 1


def _stand_still(p: nn.Parameter) -> None:
    p.requires_grad_(False)
    p.grad = None
