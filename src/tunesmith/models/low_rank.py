"""Linear layers under several nearby weights at once: W + Σ_b U_b V_bᵀ + c_k U_q Vᵀ for each of K states, in one forward pass.

The batch holds its rows K times, state after state. W is read once for all states and never written; a state differs by a
product with few columns. Shapes: M = K · n tokens, I inputs, O outputs, r columns of a block or probe, R of all blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import UserError


@dataclass(frozen=True)
class Probe:
    """A state to score: the present parameters plus `coefficient` times the direction of a query."""

    query: int
    coefficient: float


Pair = tuple[Tensor, Tensor]
"""(U [O, r], V [I, r]) in fp32."""


def is_transposed(layer: nn.Module) -> bool:
    """GPT-2's Conv1D holds its weight as [inputs, outputs]."""
    return isinstance(layer, Conv1D)


class LowRankColumns:
    """Adds to the outputs of linear layers what has gathered in low rank, and the probes of a pass."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.pairs: dict[str, list[Pair]] = {name: [] for name in layers}
        """What has gathered, block after block; probes go along the last V."""
        self.probes: Sequence[Probe] = ()
        self.u: Mapping[str, Tensor] = {}
        """Of the probes' queries, [Q, O, r]."""
        self.ready: dict[str, tuple[Tensor, Tensor]] = {}
        """What a pass multiplies with, by layer: V of all blocks [I, R], and [K, columns, O]."""
        for name, layer in layers.items():
            layer.register_forward_hook(lambda _layer, given, output, name=name: self._add(name, given[0], output))

    def add(self, name: str, u: Tensor, v: Tensor) -> None:
        """Begin a block of columns. Whoever changes `u` calls `changed`."""
        self.pairs[name].append((u, v))
        self.ready.pop(name, None)

    def changed(self) -> None:
        """Make anew what is multiplied with."""
        self.ready.clear()

    def clear(self) -> None:
        """Nothing has gathered."""
        for pairs in self.pairs.values():
            pairs.clear()
        self.changed()

    def rank(self) -> int:
        """Columns that have gathered."""
        return sum(v.shape[1] for _, v in next(iter(self.pairs.values()), []))

    def of(self, name: str) -> Pair:
        """All blocks of a layer side by side: (U [O, R], V [I, R])."""
        us, vs = zip(*self.pairs[name], strict=True)
        return torch.cat(us, 1), torch.cat(vs, 1)

    @contextmanager
    def at(self, probes: Sequence[Probe], u: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, a batch that holds its rows once for each probe is scored under their states."""
        self.probes, self.u = probes, u
        self.changed()
        try:
            yield
        finally:
            self.probes, self.u = (), {}
            self.changed()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the layers are as their weights say."""
        kept = self.pairs
        self.pairs = {name: [] for name in kept}
        self.changed()
        try:
            yield
        finally:
            self.pairs = kept
            self.changed()

    def _add(self, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        if not self.pairs[name]:
            return None
        states = max(1, len(self.probes))
        if name not in self.ready:
            self.ready[name] = self._prepare(name, y.dtype)
        v_IR, right_KCO = self.ready[name]
        tokens, outputs = y.numel() // y.shape[-1], y.shape[-1]
        if tokens % states:
            raise UserError(
                f"method.scorer: {name} gets {tokens} tokens for {states} states: it does not see all tokens of each; set "
                "method.scorer to in_place"
            )
        with torch.autocast(x.device.type, enabled=False):
            z_KnR = (x.reshape(-1, x.shape[-1]).to(v_IR.dtype) @ v_IR).view(states, -1, v_IR.shape[1])
            left = [z_KnR] * (2 if y.element_size() < 4 else 1)
            if self.probes:
                rank = self.pairs[name][-1][1].shape[1]
                coefficients = [probe.coefficient for probe in self.probes]
                scale_K = torch.tensor(coefficients, dtype=z_KnR.dtype, device=x.device)
                left.append(z_KnR[..., -rank:] * scale_K[:, None, None])
            left_KnC = torch.cat(left, -1) if len(left) > 1 else left[0]
            y_KnO = y.view(states, tokens // states, outputs)
            if torch.is_grad_enabled():
                return torch.baddbmm(y_KnO, left_KnC, right_KCO).view(y.shape)
            y_KnO.baddbmm_(left_KnC, right_KCO)
            return None

    def as_adapters(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The states of `at` as products B A that are added to the weight: (A [C, I] of all states, B [K, O, C]). In 16 bits
        each column is two, the rounded numbers and what rounding left."""
        u, v = self.of(name)
        last = self.pairs[name][-1][1]
        scale_K = torch.tensor([probe.coefficient for probe in self.probes], device=v.device)
        moved_KOr = self.u[name][[probe.query for probe in self.probes]] * scale_K[:, None, None]
        b_KOC = torch.cat([u.expand(len(self.probes), *u.shape), moved_KOr], 2)
        a_IC = torch.cat([v, last], 1).to(dtype)  # noise is exact in 16 bits too
        rounded = b_KOC.to(dtype)
        if dtype.itemsize >= 4:
            return a_IC.T, rounded
        return torch.cat([a_IC, a_IC], 1).T, torch.cat([rounded, (b_KOC - rounded.float()).to(dtype)], 2)

    def _prepare(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gathered columns and those of the probes stay apart: together, the small ones would drown in rounding. In 16 bits
        the gathered ones are two terms, the rounded numbers and what rounding left."""
        u, v = self.of(name)
        parts = [u.to(dtype)]
        if dtype.itemsize < 4:
            parts.append((u - parts[0].float()).to(dtype))
        right_CO = torch.cat(parts, 1).T
        if not self.probes:
            return v.to(dtype), right_CO[None]
        of_probe_KrO = self.u[name][[probe.query for probe in self.probes]].to(dtype).mT
        gathered_KCO = right_CO.expand(len(self.probes), *right_CO.shape)
        return v.to(dtype), torch.cat([gathered_KCO, of_probe_KrO], 1)


def linear_layers(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    """(name, module) of the linear layers inside."""
    for name, layer in module.named_modules(prefix=prefix):
        if isinstance(layer, nn.Linear | Conv1D):
            yield name, layer
