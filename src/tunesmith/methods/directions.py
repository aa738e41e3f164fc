"""What a zeroth-order method moves along: random directions in weight space, and the update that has gathered in them.

Both kinds are pure functions of a seed and a few numbers, so a log of scalars is all that a checkpoint needs.
Shapes: a layer maps I inputs to O outputs; r rank of a direction, R columns that have gathered, Q queries of a step.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunesmith.methods.noise import Noise, key_of, noise, random_bits
from tunesmith.methods.shelf import TensorFile
from tunesmith.models.low_rank import LowRankColumns, is_transposed
from tunesmith.phases import phase
from tunesmith.tensors import is_hollow

U, V, DENSE, DITHER = range(4)
"""What a key is for."""


class Directions(Protocol):
    """What the method asks of either kind."""

    def begin(self, step: int, queries: int) -> None:
        """Draw the directions of a step, folding and renewing what is due before it."""
        ...

    def move(self, coefficients: Sequence[float]) -> None:
        """θ ← θ - Σ_q coefficient_q · direction_q."""
        ...

    def weights(self) -> dict[str, nn.Parameter]:
        """What the directions change, by name."""
        ...

    def direction(self, name: str, query: int) -> Tensor:
        """The whole matrix (or vector) by which a weight changes per unit of coefficient."""
        ...

    def checksum(self) -> int:
        """CRC-32 of what has gathered and is not yet in the weights; 0 where everything is."""
        ...

    def state(self) -> Iterator[Tensor]:
        """All that updates change."""
        ...

    def folded(self) -> AbstractContextManager[None]:
        """Inside, the weights are all there is: for saving. Afterwards they have the bits that they had."""
        ...

    def off(self) -> AbstractContextManager[None]:
        """Inside, the model is as its weights say."""
        ...

    def fill(self, steps: int) -> None:
        """Before any step: hold as much as will be held at most in so many steps."""
        ...

    def state_bytes(self) -> int:
        """Bytes held beside the weights."""
        ...


class LowRankDirections:
    """Directions U Vᵀ of linear layers (LOZO, Chen et al. 2024, arXiv 2410.07698, algorithm 1).

    U [O, r] is drawn anew at every step, V [I, r] every `refresh_every` steps; both have mean 0 and variance 1. So updates
    gather in U alone, exactly, in fp32: W + U_acc Vᵀ. When V is drawn anew the pair joins a bank of columns; when the bank has
    `bank_rank` of them it is folded into the weights, and never otherwise are these written. Of 16-bit weights an fp32 master
    waits aside; they are it, rounded by a threshold that each number has for good: right on average, and a function of the log.
    Unlike LOZO's code, the step that draws a new V applies the U that it probed.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], *, rank: int, refresh_every: int, kind: Noise, seed: int, momentum: float,
        bank_rank: int | None, on_disk: bool,
    ) -> None:  # fmt: skip
        """bank_rank: None never folds."""
        self.layers = dict(layers)
        self.places = {name: index for index, name in enumerate(self.layers)}
        self.rank, self.refresh_every, self.kind, self.seed = rank, refresh_every, kind, seed
        self.decay, self.bank_rank = momentum, bank_rank
        self.block = -1
        self.columns = LowRankColumns(self.layers)
        self.gathered: dict[str, Tensor] = {}
        """U_acc of the present block, [O, r] fp32."""
        self.momentum: dict[str, Tensor] = {}
        self.u: dict[str, Tensor] = {}
        """This step's, [Q, O, r] fp32."""
        self.v: dict[str, Tensor] = {}
        self.file = TensorFile() if on_disk else None
        self.masters: dict[str, Tensor] = {}
        self.step, self.queries = -1, 1
        self.folds = 0
        """How often what had gathered has been put into the weights."""

    def begin(self, step: int, queries: int) -> None:
        self.step, self.queries = step, queries
        if step // self.refresh_every != self.block:
            self._renew(step // self.refresh_every)
        for index, (name, layer) in enumerate(self.layers.items()):
            outputs, device = layer_sizes(layer)[0], device_of(layer)
            drawn = [
                noise(self.kind, key_of(self.seed, U, step, q, index), (outputs, self.rank), device)
                for q in range(queries)
            ]
            self.u[name] = torch.stack(drawn)

    @torch.no_grad()
    def _renew(self, block: int) -> None:
        """A new V. What has gathered in the old one stays as columns, or is folded into the weights with all others."""
        bank_is_full = self.bank_rank is not None and self.columns.rank() + self.rank > self.bank_rank
        if self.block >= 0 and bank_is_full:
            self.fold()
        self.block = block
        for index, (name, layer) in enumerate(self.layers.items()):
            (outputs, inputs), device = layer_sizes(layer), device_of(layer)
            v = noise(self.kind, key_of(self.seed, V, block, index), (inputs, self.rank), device)
            if name in self.momentum:  # its projection onto the new directions (LOZO, section 4.2)
                self.momentum[name] = self.momentum[name] @ (self.v[name].T @ v) / inputs
            self.v[name] = v
            self.gathered[name] = torch.zeros(outputs, self.rank, device=device)
            self.columns.add(name, self.gathered[name], v)

    def max_columns(self, steps: int) -> int:
        """Columns that are gathered at most in so many steps."""
        gathered = self.rank * -(-steps // self.refresh_every)
        return gathered if self.bank_rank is None else max(self.rank, min(gathered, self.bank_rank))

    def fill(self, steps: int) -> None:
        for block in range(self.columns.rank() // self.rank, -(-self.max_columns(steps) // self.rank)):
            self._renew(block)
        self.block = 0

    @torch.no_grad()
    def move(self, coefficients: Sequence[float]) -> None:
        """Multiplied and subtracted in two roundings, so that every device comes to the same bits."""
        gathered = [self.gathered[name] for name in self.layers]
        for query, coefficient in enumerate(coefficients):
            parts = torch._foreach_mul([self.u[name][query] for name in self.layers], coefficient / self.rank)
            if self.decay:
                if not self.momentum:
                    self.momentum = {name: torch.zeros_like(x) for name, x in self.gathered.items()}
                held = list(self.momentum.values())
                if query == 0:
                    torch._foreach_mul_(held, self.decay)
                torch._foreach_add_(held, parts)
            else:
                torch._foreach_sub_(gathered, parts)
        if self.decay and self.momentum:
            torch._foreach_sub_(gathered, list(self.momentum.values()))
        self.columns.changed()

    @torch.no_grad()
    def fold(self) -> None:
        """Put all that has gathered into the weights, and empty the bank."""
        if not self.columns.rank():
            return
        for name in self.layers:
            if self._is_wide(name):
                self._add_columns(name)
            else:
                self.masters[name] = self._keep(name, self._total(name))
                self._round(name, self.masters[name])
        self.columns.clear()
        self.folds += 1

    def _is_wide(self, name: str) -> bool:
        """Whether the weight takes an update without rounding it away."""
        return self._matrix(name).element_size() >= 4

    def _matrix(self, name: str) -> Tensor:
        """A layer's weight as [O, I]."""
        layer: Any = self.layers[name]
        return layer.weight.T if is_transposed(layer) else layer.weight

    def _add_columns(self, name: str) -> None:
        weight, (u, v) = self._matrix(name), self.columns.of(name)
        weight.addmm_(u.to(weight.dtype), v.T.to(weight.dtype))

    def _total(self, name: str) -> Tensor:
        """A 16-bit weight with all that has gathered, in fp32 on the host."""
        master, (u, v) = self.masters.get(name), self.columns.of(name)
        start = self._matrix(name).float().cpu() if master is None else master
        return torch.addmm(start, u.cpu(), v.T.cpu())

    def _round(self, name: str, master: Tensor) -> None:
        """Let a 16-bit weight be what its master rounds to."""
        weight = self._matrix(name)
        weight.copy_(_dithered(master.to(weight.device), key_of(self.seed, DITHER, self.places[name])))

    def _keep(self, name: str, x: Tensor) -> Tensor:
        return x.to("cpu", copy=True) if self.file is None else self.file.keep(name, x)

    def weights(self) -> dict[str, nn.Parameter]:
        return {f"{name}.weight": layer.weight for name, layer in self.layers.items()}  # type: ignore[misc]

    def direction(self, name: str, query: int) -> Tensor:
        layer = name.removesuffix(".weight")
        u, v = self.u[layer][query], self.v[layer]
        if self.layers[layer].weight.dtype == torch.float64:
            u, v = u.double(), v.double()
        whole = u @ v.T
        return whole.T if is_transposed(self.layers[layer]) else whole

    def checksum(self) -> int:
        return crc_of(self.gathered.values())

    def state(self) -> Iterator[Tensor]:
        yield from self.weights().values()
        yield from (x for name in self.layers for pair in self.columns.pairs[name] for x in pair)
        yield from self.momentum.values()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """A weight with a master is rounded anew from it afterwards; of others a copy waits where masters do."""
        copies: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for name in self.layers if self.columns.rank() else ():
                    if name not in self.masters:
                        with phase("host"):
                            copies[name] = self._keep(f"{name} before", self._matrix(name).detach())
                    if self._is_wide(name):
                        self._add_columns(name)
                    else:
                        self._round(name, self._total(name))
            with self.columns.off():
                yield
        finally:
            with torch.no_grad():
                for name, before in copies.items():
                    self._matrix(name).copy_(before)
                for name, master in self.masters.items():
                    self._round(name, master)

    def off(self) -> AbstractContextManager[None]:
        return self.columns.off()

    def state_bytes(self) -> int:
        numbers = sum(sum(layer_sizes(layer)) for layer in self.layers.values()) * self.rank
        momentum = sum(layer_sizes(layer)[0] for layer in self.layers.values()) * self.rank if self.decay else 0
        banks = 1 if self.bank_rank is None else max(1, self.bank_rank // self.rank)
        return 4 * (numbers * banks + momentum)


class DenseDirections:
    """Directions over whole parameters, each number drawn for itself (MeZO, Malladi et al. 2023, arXiv 2305.17333)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, kind: Noise, seed: int, momentum: float) -> None:
        self.parameters, self.kind, self.seed, self.decay = dict(parameters), kind, seed, momentum
        self.places = {name: index for index, name in enumerate(self.parameters)}
        self.momentum: dict[str, Tensor] = {}
        self.step = 0

    def begin(self, step: int, queries: int) -> None:
        self.step = step

    def direction(self, name: str, query: int) -> Tensor:
        p = self.parameters[name]
        key = key_of(self.seed, DENSE, self.step, query, self.places[name])
        return noise(self.kind, key, tuple(p.shape), p.device)

    @torch.no_grad()
    def move(self, coefficients: Sequence[float]) -> None:
        for name, p in self.parameters.items():
            held = self.momentum.setdefault(name, torch.zeros_like(p)).mul_(self.decay) if self.decay else None
            for query, coefficient in enumerate(coefficients):
                part = (self.direction(name, query) * coefficient).to(p.dtype)
                if held is None:
                    p.sub_(part)
                else:
                    held.add_(part)
            if held is not None:
                p.sub_(held)

    def fill(self, steps: int) -> None:
        """Nothing gathers."""

    def weights(self) -> dict[str, nn.Parameter]:
        return self.parameters

    def checksum(self) -> int:
        return 0

    def state(self) -> Iterator[Tensor]:
        yield from self.parameters.values()
        yield from self.momentum.values()

    def folded(self) -> AbstractContextManager[None]:
        return nullcontext()

    def off(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters.values()) if self.decay else 0


def crc_of(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of their bits, one after the other."""
    total = 0
    for x in tensors:
        numbers = b"" if is_hollow(x) else x.detach().cpu().contiguous().numpy().tobytes()
        total = zlib.crc32(numbers, total)
    return total


def device_of(layer: Any) -> torch.device:
    return layer.weight.device


def layer_sizes(layer: Any) -> tuple[int, int]:
    """(outputs, inputs)."""
    rows, columns = layer.weight.shape
    return (columns, rows) if is_transposed(layer) else (rows, columns)


def _dithered(x: Tensor, key: int) -> Tensor:
    """fp32 in bf16: up where the remainder is above a threshold that each place has for good, else down."""
    threshold = (
        random_bits(key, -(-x.numel() // 4), x.device).view(torch.int16)[: x.numel()].view(x.shape).int() + 2**15
    )
    # + threshold carries into the upper half where remainder + threshold ≥ 2^16; a remainder of 0 never does
    return (x.view(torch.int32) + threshold).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)
