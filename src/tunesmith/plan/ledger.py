"""Which bytes are held at each moment, and what for: of a run on the CPU, or of one that is only foreseen."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.plan.flops import OF_OPERATION
from tunesmith.tensors import local_part

WHOLE = ("evaluation", "reference", "generation")
"""Phases whose parts are not told apart."""

KINDS = {
    "forward": "activations",
    "logits": "logits and loss",
    "backward": "backward pass",
    "update": "update",
    "evaluation": "evaluation",
    "reference": "evaluation",
    "generation": "generation",
    "host": "on the host",
}
"""What is made in a phase, unless it is named otherwise."""


DEVICE = torch.ops.prim.device.default
"""What asking for a tensor's device calls, of those that are a class of their own."""


WRAPPERS = (DTensor, AsyncCollectiveTensor)
"""Tensors of several ranks, which hold others and do with these what is asked of them."""


def tensors_in(args: Iterable[Any], kwargs: Mapping[str, Any] = MappingProxyType({})) -> Iterator[Tensor]:
    """Those among an operation's arguments or results, lists looked into."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors_in(x)


class Peak(NamedTuple):
    """The most that was held."""

    bytes: int
    kinds: Mapping[str, int]
    """Of it, by what it is for."""


class Ledger(TorchDispatchMode):
    """Counts storages while they live, whose operations it sees; what kernels take inside themselves is not among them.

    `kind` names what is made now. What was there before is counted when it is named (`name`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "other"
        self.held: Counter[str] = Counter()
        """Bytes now, by kind."""
        self.kinds: dict[int, tuple[str, int]] = {}
        """Of each storage its kind and bytes."""
        self.peaks: dict[str, Peak] = {}
        """Of each phase the most that was held."""
        self.phase = ""
        self.total = 0
        self.flops = 0
        """Of matrix products, attention and convolutions."""
        self.moved = 0
        """Bytes that other operations read and write."""
        self.operations = 0

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, peaks are of this phase, and what is made is of its kind. Within an evaluation they stay the evaluation's."""
        before = self.phase, self.kind
        self.phase = before[0] if before[0] in WHOLE else phase
        self.kind = KINDS.get(phase, self.kind)
        self._note_peak()
        try:
            yield
        finally:
            self.phase, self.kind = before

    def name(self, tensors: Iterable[Any], kind: str) -> None:
        """Say what tensors are for, whenever they were made."""
        for x in tree_leaves(list(tensors)):
            if isinstance(x, Tensor):
                self._count(x, kind, again=True)
        self._note_peak()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is not DEVICE:
            self.seen(function, args, kwargs or {}, result)
        return result

    def seen(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count what an operation has made and done."""
        for x in tensors_in((result,)):
            if (place := place_of(x)) not in self.kinds and not any(
                place_of(y) == place for y in tensors_in(args, kwargs)
            ):
                again = self.kind == "backward pass" and torch.is_grad_enabled()
                self._count(x, "activations, computed again" if again else self.kind)
        self._work(function, args, kwargs, result)

    def _work(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        if formula := OF_OPERATION.get(function._overloadpacket):
            self.operations += 1
            self.flops += formula(*args, **kwargs, out_val=result)
        elif not function.is_view:
            self.operations += 1
            self.moved += sum(x.numel() * x.element_size() for x in tensors_in((*args, result), kwargs))

    def _count(self, x: Tensor, kind: str, again: bool = False) -> None:
        storage = local_part(x.detach() if x.requires_grad else x).untyped_storage()
        place = storage._cdata
        if place in self.kinds:
            before, size = self.kinds[place]
            if again and before != kind:
                self.held[before] -= size
                self.held[kind] += size
                self.kinds[place] = kind, size
            return
        size = storage.nbytes()
        self.kinds[place] = kind, size
        self.held[kind] += size
        self.total += size
        weakref.finalize(storage, self._gone, place)
        self._note_peak()

    def _gone(self, place: int) -> None:
        kind, size = self.kinds.pop(place)
        self.held[kind] -= size
        self.total -= size

    def _note_peak(self) -> None:
        before = self.peaks.get(self.phase)
        if before is None or self.total >= before.bytes:
            self.peaks[self.phase] = Peak(self.total, +self.held)

    def add(self, kind: str, size: int, phases: Iterable[str]) -> None:
        """What was not there yet in these phases, but will be the next time."""
        for name in phases:
            if name in self.peaks:
                peak = self.peaks[name]
                self.peaks[name] = Peak(peak.bytes + size, +(Counter(peak.kinds) + Counter({kind: size})))


def place_of(x: Tensor) -> int:
    """What tells a storage from all that live beside it."""
    return int(local_part(x).untyped_storage()._cdata)
