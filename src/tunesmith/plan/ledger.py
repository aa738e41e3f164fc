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
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

from tunesmith.plan.flops import OF_OPERATION

WHOLE = ("evaluation", "reference", "generation", "saving")
"""Phases whose parts are not told apart."""

OF_A_PASS = ("forward", "logits", "backward")
"""Phases in which the model computes."""

KINDS = {
    "forward": "activations",
    "logits": "logits and loss",
    "backward": "backward pass",
    "update": "update",
    "evaluation": "evaluation",
    "reference": "evaluation",
    "generation": "generation",
    "saving": "saving",
    "host": "on the host",
    "disk": "on disk",
}
"""What is made in a phase, unless it is named otherwise."""

ASIDE = ("host", "disk")
"""What is done within other phases, whose peaks these are."""


META = torch.device("meta")

DEVICE = torch.ops.prim.device.default
"""What asking for a tensor's device calls, of those that are a class of their own."""


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


class Peaks:
    """What is known of a step whose peaks have been seen."""

    peaks: Mapping[str, Peak]
    """By phase: forward, logits, backward, update, evaluation, reference, generation, saving, and between them ("")."""

    @property
    def phase(self) -> str:
        """When the most is held."""
        return max(self.peaks, key=lambda name: self.peaks[name].bytes)

    @property
    def peak(self) -> Peak:
        return self.peaks[self.phase]


class Work(NamedTuple):
    """What was computed."""

    flops: int = 0
    """Of matrix products, attention and convolutions."""
    moved: int = 0
    """Bytes that other operations read and write."""
    operations: int = 0
    carried: int = 0
    """Bytes that a pass through the model brings from the host's memory to the device."""

    def plus(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def less(self, other: Work) -> Work:
        return Work(*(a - b for a, b in zip(self, other, strict=True)))


class Ledger(TorchDispatchMode):
    """Counts storages while they live, whose operations it sees; what kernels take inside themselves is not among them.

    `kind` names what is made now. What was there before is counted when it is named (`name`). elsewhere: kinds that are not
    in the memory that is counted.
    """

    def __init__(self, elsewhere: Iterable[str] = ("on disk",)) -> None:
        super().__init__()
        self.kind = "other"
        self.elsewhere = frozenset(elsewhere)
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
        self.carried = 0
        """Bytes that come from the host's memory while the model computes."""
        self.updates = Work()
        """Of what was computed the part of updates."""
        self._note_peak()

    @property
    def work(self) -> Work:
        """So far."""
        return Work(self.flops, self.moved, self.operations, self.carried)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, peaks are of this phase, and what is made is of its kind. Within an evaluation they stay the evaluation's."""
        before = self.phase, self.kind
        self.phase = before[0] if before[0] in WHOLE or phase in ASIDE else phase
        self.kind = KINDS.get(phase, self.kind)
        self._note_peak()
        done = self.work
        try:
            yield
        finally:
            self.phase, self.kind = before
            if phase == "update":
                self.updates = self.updates.plus(self.work.less(done))

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Inside, what is computed is no part of the work."""
        work = self.work
        try:
            yield
        finally:
            self.flops, self.moved, self.operations, self.carried = work

    def name(self, tensors: Iterable[Any], kind: str) -> None:
        """Say what tensors are for, whenever they were made."""
        for x in tree_leaves(list(tensors)):
            if isinstance(x, Tensor):
                for part in parts_of(x):
                    self._count(part, kind, again=True)
        self._note_peak()

    def resized(self, place: int, size: int) -> None:
        """A storage that is known has so many bytes from now on."""
        kind, before = self.kinds.get(place, (None, 0))
        if kind is None or kind in self.elsewhere:
            return
        self.kinds[place] = kind, size
        self.held[kind] += size - before
        self.total += size - before
        self._note_peak()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # what it does with the tensors within comes by
        result = function(*args, **(kwargs or {}))
        if function is not DEVICE:
            self.seen(function, args, kwargs or {}, result)
        return result

    def seen(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count what an operation has made and done."""
        if kwargs.get("device") == META:  # a shape alone
            return
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
            touched = list(tensors_in((*args, result), kwargs))
            self.moved += sum(x.numel() * x.element_size() for x in touched)
            if self.phase in OF_A_PASS and "on the host" in self.elsewhere:
                self.carried += sum(x.numel() * x.element_size() for x in touched if self._waits(x))

    def _waits(self, x: Tensor) -> bool:
        """Whether it is in the host's memory, beside a device that trains."""
        return self.kinds.get(place_of(x), ("", 0))[0] == "on the host"

    def _count(self, x: Tensor, kind: str, again: bool = False) -> None:
        storage = x.untyped_storage()
        place = storage._cdata
        if place in self.kinds:
            before, size = self.kinds[place]
            if again and before != kind:
                self.held[before] -= size
                self.held[kind] += size
                self.kinds[place] = kind, size
            return
        size = 0 if kind in self.elsewhere else storage.nbytes()
        self.kinds[place] = kind, size
        self.held[kind] += size
        self.total += size
        weakref.finalize(storage, self._gone, place)
        self._note_peak()

    def _gone(self, place: int) -> None:
        kind, size = self.kinds.pop(place)
        self.held[kind] -= size
        self.total -= size

    def restart(self) -> None:
        """Forget the peaks so far."""
        self.peaks.clear()
        self._note_peak()

    def _note_peak(self) -> None:
        before = self.peaks.get(self.phase)
        if before is None or self.total >= before.bytes:
            self.peaks[self.phase] = Peak(self.total, +self.held)


@contextmanager
def following(ledger: Ledger) -> Iterator[None]:
    """Inside, the ledger hears of every storage that is let go of and taken again while its tensors stay, as FSDP does with
    gathered weights and method chunk with streamed ones."""
    resize = torch.UntypedStorage.resize_

    def noted(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        ledger.resized(storage._cdata, storage.nbytes())
        return found

    torch.UntypedStorage.resize_ = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def place_of(x: Tensor) -> int:
    """What tells a storage from all that live beside it."""
    return int(x.untyped_storage()._cdata)


def parts_of(x: Tensor) -> Iterator[Tensor]:
    """The tensors of which one consists, such as codes and scales, or a rank's part."""
    x = x.detach()
    if is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            if isinstance(part := getattr(x, name), Tensor):  # a mesh of ranks is named among them
                yield from parts_of(part)
    else:
        yield x
