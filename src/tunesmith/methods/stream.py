"""Blocks whose weights wait off the device, and come one by one when their turn in a pass is near."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tunesmith.methods.shelf import TensorFile
from tunesmith.phases import phase
from tunesmith.tensors import is_hollow

WINDOW = 2
"""Blocks on the device beside those that train: the one that computes, and the next."""


class WeightStream:
    """Brings the weights of blocks to the device ahead of their forward and backward pass, and lets go of those behind.

    A block's parameters keep their storage, which is emptied and filled again, so that what autograd has saved of them
    (views, transposes) is whole whenever its block runs. Blocks that train are held until their turn ends; then their weights
    are written back.
    """

    def __init__(self, blocks: Sequence[nn.Module], on_disk: bool) -> None:
        self.blocks = blocks
        self.file = TensorFile() if on_disk else None
        self.waiting: list[dict[nn.Parameter, Tensor]] = [self._put_aside(block) for block in blocks]
        self.present: OrderedDict[int, torch.cuda.Event | None] = OrderedDict()
        """Blocks on the device, the one used longest ago first, and when each has arrived."""
        self.held: frozenset[int] = frozenset()
        self.below = False
        """Whether the backward pass goes on below the blocks that are held."""
        self.device: torch.device | None = None
        self.copies: torch.cuda.Stream | None = None
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *given, n=number: self._before_forward(n, given), with_kwargs=True)
            block.register_forward_hook(lambda *given, n=number: self._after_forward(n, given[-1]))

    def _put_aside(self, block: nn.Module) -> dict[nn.Parameter, Tensor]:
        """Its weights' places to wait. In the host's memory they lie side by side: pinned memory comes in powers of two."""
        if self.file is not None:
            aside = {p: self.file.keep(f"{id(p)} {name}", p.data) for name, p in block.named_parameters()}
        else:
            sizes = {p: -(-p.numel() * p.element_size() // 64) * 64 for p in block.parameters()}
            pin = torch.cuda.is_available() and not any(map(is_hollow, sizes))
            with phase("host"):
                memory = torch.empty(sum(sizes.values()), dtype=torch.uint8, pin_memory=pin)
            aside = {}
            for p, part in zip(sizes, memory.split(list(sizes.values())), strict=True):
                aside[p] = part[: p.numel() * p.element_size()].view(p.dtype).view(p.shape).copy_(p.data)
        for p in aside:
            p.data = torch.empty_like(p.data)
            p.untyped_storage().resize_(0)
        return aside

    def _before_forward(self, number: int, given: Any) -> None:
        if self.device is None:
            self.device = next(x.device for x in tree_leaves(given) if isinstance(x, Tensor))
            self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.bring(number)
        if number + 1 < len(self.blocks):
            self._fetch(number + 1)

    def _after_forward(self, number: int, output: Any) -> None:
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda _grad: self._before_backward(number))

    def _before_backward(self, number: int) -> None:
        self.bring(number)
        if number > min(self.held, default=len(self.blocks)) or (self.below and number > 0):
            self._fetch(number - 1)

    def bring(self, number: int) -> None:
        """See to it that a block's weights are there for what is computed next."""
        self._fetch(number)
        self.present.move_to_end(number)
        if (arrived := self.present[number]) is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

    def _fetch(self, number: int) -> None:
        """Begin to bring a block, in the place of the one used longest ago."""
        if number in self.present:
            return
        free = [n for n in self.present if n not in self.held]
        for old in free[: max(0, len(free) - WINDOW + 1)]:
            if (arrived := self.present.pop(old)) is not None:  # a copy that nothing has waited for
                torch.cuda.current_stream(self.device).wait_event(arrived)
            for p in self.waiting[old]:
                p.untyped_storage().resize_(0)
        for p in self.waiting[number]:
            if p.device != self.device:
                p.data = torch.empty_like(p.data, device=self.device)
            p.untyped_storage().resize_(p.numel() * p.element_size())
        arrived = None
        if self.copies is not None:  # memory just taken may still be read by what was computed before
            self.copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.copies):
                self._copy_in(number)
                arrived = torch.cuda.Event()
                arrived.record(self.copies)
        else:
            self._copy_in(number)
        self.present[number] = arrived

    def _copy_in(self, number: int) -> None:
        for p, aside in self.waiting[number].items():
            p.data.copy_(aside, non_blocking=True)

    def hold(self, numbers: Iterable[int], device: torch.device, below: bool) -> None:
        """Keep these blocks on the device, and no others; what those have learnt is written back first. `below`: something
        trains that stands before all blocks.
        """
        self.write_back()
        self.below = below
        self.device = self.device or device
        self.held = frozenset(numbers)
        for number in self.held:
            self.bring(number)

    def in_memory(self) -> list[Tensor]:
        """What waits in the host's memory."""
        return [] if self.file is not None else [x for aside in self.waiting for x in aside.values()]

    def write_back(self) -> None:
        """Copy the weights of held blocks to where they wait."""
        for number in self.held:
            for p, aside in self.waiting[number].items():
                aside.copy_(p.data)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, all parameters are those that wait: for reading, saving and loading, not for computing."""
        self.write_back()
        if self.copies is not None:
            self.copies.synchronize()
        placed = {p: p.data for block in self.waiting for p in block}
        for block in self.waiting:
            for p, waiting in block.items():
                p.data = waiting
        try:
            yield
        finally:
            for p, data in placed.items():
                p.data = data
            for number in self.present:
                self._copy_in(number)
