"""Where the optimizer state of chunks waits for their turn: in the host's memory or in a temporary file, in 32 or 8 bits."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.phases import phase
from tunesmith.tensors import is_hollow, laid_out, layout_of, local_part

BLOCK = 256
"""Numbers that share a scale in 8 bits."""

State = dict[str, Tensor]


class Shelf:
    """Tensors by key and name, off the device. comes_ahead: what `fetch` asks for takes memory of the device from then on."""

    def __init__(self, device: torch.device, on_disk: bool, eight_bit: bool, comes_ahead: bool = False) -> None:
        self.device, self.eight_bit = device, eight_bit
        self.file = TensorFile() if on_disk else None
        self.kept: dict[str, State] = {}
        self.layouts: dict[str, dict[str, Any]] = {}
        self.ahead: dict[str, tuple[State, torch.cuda.Event | None]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.comes_ahead = comes_ahead or self.stream is not None  # which also waits for copies that are still leaving
        self.leaving: list[torch.cuda.Event] = []

    def put(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Take a state off the device. What the device holds of it is free once the copy is done."""
        self.ahead.pop(key, None)
        state = self._own(key, state)
        packed = _packed(state) if self.eight_bit else dict(state)
        if self.file is not None:
            self.kept[key] = {name: self.file.keep(f"{key} {name}", x) for name, x in packed.items()}
        elif self.stream is None:
            with phase("host"):
                self.kept[key] = {name: x.detach().clone() for name, x in packed.items()}
        else:
            self._settle(keep=1)
            target = self.kept.get(key, {})
            if target.keys() != packed.keys():  # a loaded state of the chunk that was training is not packed
                target = {n: torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for n, x in packed.items()}
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for name, x in packed.items():
                    target[name].copy_(x, non_blocking=True)
                    x.record_stream(self.stream)
                done = torch.cuda.Event()
                done.record(self.stream)
            self.kept[key] = target
            self.leaving.append(done)

    def fetch(self, key: str) -> None:
        """Begin to bring a state back, beside what the device is doing."""
        if not self.comes_ahead or key not in self.kept or key in self.ahead:
            return
        if self.stream is None:  # a plan
            self.ahead[key] = {name: x.to(self.device, copy=True) for name, x in self.kept[key].items()}, None
            return
        with torch.cuda.stream(self.stream):  # behind the copies that leave: a state is whole before it comes back
            arriving = {name: x.to(self.device, non_blocking=True) for name, x in self.kept[key].items()}
            done = torch.cuda.Event()
            done.record(self.stream)
        self.ahead[key] = arriving, done

    def get(self, key: str) -> State | None:
        """A state on the device; None if there is none under this key."""
        if key not in self.kept:
            return None
        self.fetch(key)
        found, done = self.ahead.pop(key, ({}, None))
        if not found:
            found = {name: x.to(self.device, copy=True) for name, x in self.kept[key].items()}
        if done is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for x in found.values():
                x.record_stream(current)
        return self._laid_out(key, _unpacked(found) if self.eight_bit else found)

    def in_memory(self) -> list[Tensor]:
        """What of it waits in the host's memory."""
        return [] if self.file is not None else [x for state in self.kept.values() for x in state.values()]

    def state_dict(self) -> dict[str, State]:
        """All that waits, as it is kept (8-bit states stay so)."""
        self._settle(keep=0)
        return {key: self._laid_out(key, state) for key, state in self.kept.items()}

    def load_state_dict(self, saved: Mapping[str, State]) -> None:
        self.kept, self.ahead, self.layouts = {}, {}, {}
        for key, state in ((key, self._own(key, state)) for key, state in saved.items()):
            if self.file is not None:
                self.kept[key] = {name: self.file.keep(f"{key} {name}", x) for name, x in state.items()}
            else:
                pin = self.stream is not None
                self.kept[key] = {name: x.pin_memory() if pin else x.clone() for name, x in state.items()}

    def _own(self, key: str, state: Mapping[str, Tensor]) -> State:
        """Of tensors that ranks share the parts that are here."""
        self.layouts[key] = {name: layout_of(x) for name, x in state.items()}
        return {name: local_part(x.detach()) for name, x in state.items()}

    def _laid_out(self, key: str, state: State) -> State:
        """The inverse."""
        return {name: laid_out(x, self.layouts[key].get(name)) for name, x in state.items()}

    def _settle(self, keep: int) -> None:
        """Wait until at most `keep` states are on their way off the device."""
        while len(self.leaving) > keep:
            self.leaving.pop(0).synchronize()


class TensorFile:
    """A temporary file of tensors, each at a place of its own. What is returned is mapped: it costs no memory to hold."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="tunesmith-")  # noqa: SIM115  it lives as long as the run
        weakref.finalize(self, self.file.close)
        self.places: dict[str, int] = {}
        self.end = 0

    def keep(self, key: str, x: Tensor) -> Tensor:
        x = x.detach().cpu().contiguous()
        if x.numel() == 0 or x.ndim == 0:
            return x.clone()
        if is_hollow(x):
            with phase("disk"):
                return x.clone()
        array = x.view(torch.uint8).numpy()
        if key not in self.places:
            self.places[key] = self.end
            self.end += -(-array.nbytes // 4096) * 4096
        try:
            self.file.seek(self.places[key])
            self.file.write(array.data)
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: what waits for its turn cannot be written: {error.strerror}; make room, set TMPDIR "
                "to another folder, or method.offload to host; the run goes on from its last checkpoint with --resume"
            ) from error
        mapped = np.memmap(self.file, np.uint8, "r+", self.places[key], (array.nbytes,))
        return torch.from_numpy(mapped).view(x.dtype).view(x.shape)


def _packed(state: Mapping[str, Tensor]) -> State:
    """Moments in a byte each and an fp32 scale per block; the rest as it is."""
    packed: State = {}
    for name, x in state.items():
        if x.ndim == 0 or name == "master":
            packed[name] = x
        else:
            packed[f"{name}/code"], packed[f"{name}/scale"] = to_8bit(x, is_square="sq" in name)
    return packed


def _unpacked(packed: State) -> State:
    state = {name: x for name, x in packed.items() if "/" not in name}
    for name in (name.removesuffix("/code") for name in packed if name.endswith("/code")):
        state[name] = from_8bit(packed[f"{name}/code"], packed[f"{name}/scale"], is_square="sq" in name)
    return state


def to_8bit(x: Tensor, *, is_square: bool) -> tuple[Tensor, Tensor]:
    """(codes, uint8 or int8 in x's shape, largest magnitude of each block of 256, fp32 [n / 256]) of a moment.

    A first moment's code is 127 · sign · (|x| / largest)^(1/2): a finer grain for small numbers. A second moment's is
    255 · (x / largest)^(1/4), rounded up: it never becomes smaller, least of all 0, by which Adam would divide.
    """
    flat = x.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    share = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()[: len(flat)]
    if is_square:
        return (255 * share.clamp(0, 1).sqrt_().sqrt_()).ceil_().to(torch.uint8).view(x.shape), scale
    return (127 * share.abs().sqrt() * share.sign()).round_().to(torch.int8).view(x.shape), scale


def from_8bit(code: Tensor, scale: Tensor, *, is_square: bool) -> Tensor:
    """The moment, fp32, from what `to_8bit` made."""
    share = code.flatten().float() / (255 if is_square else 127)
    share = share**4 if is_square else share * share.abs()
    return (share * scale.repeat_interleave(BLOCK)[: len(share)]).view(code.shape)
