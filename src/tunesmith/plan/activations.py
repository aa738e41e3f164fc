"""What forward and backward passes hold beside weights and gradients: measured block by block on the model itself.

One pass without gradients goes through the model; on the way each kind of block runs again on its own input, with its weights
still and with its weights training, and what it keeps and needs is counted. So the most that is held is one block's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from tunesmith.models.head import Head, Targets, score_targets
from tunesmith.models.load import blocks, decoder_of
from tunesmith.plan.ledger import Ledger, place_of


@dataclass(frozen=True)
class BlockBytes:
    """What one block takes for a micro-batch."""

    entering: int
    """Its input: all that is kept of it under activation checkpointing."""
    frozen: int
    """Kept for its backward pass while its own weights stand still."""
    training: int
    """Kept while all of them train."""
    working: int
    """At the peak of its backward pass, beside what is kept, gradients of weights not counted."""
    passing: int
    """At the peak of its forward pass without gradients."""


@dataclass(frozen=True)
class Activations:
    """What a micro-batch takes in each block and behind the last one."""

    blocks: tuple[BlockBytes, ...]
    head: int
    """From the last hidden states to the loss and back."""

    def peak(self, lowest: int, training: Collection[int], checkpointing: bool) -> int:
        """Bytes at the peak of a step whose backward pass ends in block `lowest` (-1: in the embeddings; the number of blocks:
        above all of them), while the weights of blocks `training` train."""
        used = range(max(0, lowest), len(self.blocks))
        whole = {b: self.blocks[b].training if b in training else self.blocks[b].frozen for b in used}
        kept = {b: self.blocks[b].entering if checkpointing else whole[b] for b in used}
        at_head = sum(kept.values()) + self.head
        found, below = [at_head], 0
        for b in used:
            found.append(below + max(whole[b], kept[b]) + self.blocks[b].working)
            below += kept[b]
        return max([*found, *(block.passing for block in self.blocks)])


def measure(model: Any, head: Head, rows: int, tokens: int) -> Activations:
    """Run a micro-batch of so many rows and tokens through the model. Call it under the run's autocast."""
    device = model.device
    input_ids = torch.zeros(rows, tokens, dtype=torch.long, device=device) + torch.arange(tokens, device=device) % 2
    found: list[BlockBytes] = []
    asked = False

    known: dict[Any, BlockBytes] = {}

    def run_again(block: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal asked
        if asked:
            return
        asked = True
        alike = (type(block), *((name, p.shape, p.dtype) for name, p in block.named_parameters()))
        if alike not in known:
            known[alike] = _measure_block(block, args, kwargs)
        found.append(known[alike])
        asked = False

    handles = [block.register_forward_pre_hook(run_again, with_kwargs=True) for _, block in blocks(model)]
    trained, was_training = {p: p.requires_grad for p in model.parameters()}, model.training
    model.train()  # dropout keeps its masks
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            hidden = decoder_of(model)(input_ids=input_ids, use_cache=False)[0].flatten(0, 1)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
        for p, own in trained.items():
            p.requires_grad_(own)
    whole_logits = 0
    if (
        head.linear is None and (output := model.get_output_embeddings()) is not None
    ):  # they, their gradient, in fp32 both
        whole_logits = 2 * hidden.shape[0] * output.weight.shape[0] * 4
    return Activations(tuple(found), whole_logits or _measure_head(hidden, head, input_ids.flatten()))


def _measure_block(block: nn.Module, args: Any, kwargs: Any) -> BlockBytes:
    entering = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point())
    given = {place_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    own = {place_of(p) for p in (*block.parameters(), *block.buffers())}
    kept, working = [], 0
    for trains in (False, True):
        block.requires_grad_(trains)
        start = entering.detach().requires_grad_()
        inputs, named = _replaced((args, kwargs), entering, start)
        saved: dict[int, int] = {}

        def note(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            if place_of(x) not in own | given:
                saved[place_of(x)] = x.untyped_storage().nbytes()
            return x

        with torch.enable_grad(), counting(entering.device) as count:
            with saved_tensors_hooks(note, lambda x: x):
                output = tree_leaves(block(*inputs, **named))[0]
            count.restart()
            wanted = [start, *(p for p in block.parameters() if p.requires_grad)]
            found = torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
            gradients = sum(x.untyped_storage().nbytes() for x in found[1:] if x is not None)
            working = max(working, count.peak - count.start - gradients)
        kept.append(_bytes(entering) + sum(saved.values()))
    with torch.no_grad(), counting(entering.device) as count:
        block(*args, **kwargs)
        passing = count.peak - count.start
    block.requires_grad_(False)
    frozen, training = kept
    return BlockBytes(_bytes(entering), frozen, training, max(0, working), passing + 2 * _bytes(entering))


def _measure_head(hidden: Tensor, head: Head, tokens: Tensor) -> int:
    """At the peak from hidden states to their gradient; the gradient of the head's weight not counted."""
    start = hidden.detach().requires_grad_()
    if head.linear is None:
        return 0
    with torch.enable_grad(), counting(hidden.device) as count:
        main, _ = score_targets(start * 1, head, Targets(tokens))
        main.sum().backward()
        return count.peak - count.start + _bytes(hidden)


class _Count:
    """Bytes held on a device: by the ledger, wherever torch keeps no such count itself."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.start = 0

    @property
    def peak(self) -> int:
        return self.ledger.peaks[self.ledger.phase].bytes

    def restart(self) -> None:
        self.start = self.ledger.total
        self.ledger.restart()


class _Allocator:
    """The same from CUDA's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self.start = torch.cuda.memory_allocated(self.device)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


@contextmanager
def counting(device: torch.device) -> Iterator[_Count | _Allocator]:
    """Count what is allocated inside."""
    if device.type == "cuda":
        yield _Allocator(device)
        return
    ledger = Ledger()
    with ledger:
        yield _Count(ledger)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _replaced(tree: Any, old: Tensor, new: Tensor) -> Any:
    return tree_map(lambda x: new if x is old else x, tree)
