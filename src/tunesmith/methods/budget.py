"""Chunks that keep a run within a memory budget, and which of them need activation checkpointing for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import UserError
from tunesmith.methods.base import EngineLike, Extent
from tunesmith.methods.partition import Piece, Spans, bytes_of, cut, elements_of
from tunesmith.models.load import blocks, is_multimodal
from tunesmith.plan.activations import Activations

MARGIN = {"cpu": 0.03, "accelerator": 0.005}
"""Share of the budget that is left to what cannot be counted: gaps of the C library's allocator, buffers of other libraries. An
accelerator's own count of what torch allocates has neither."""


@dataclass(frozen=True)
class Fit:
    """Chunks within a budget."""

    chunks: list[Spans]
    checkpointing: list[bool]
    """For each chunk whether blocks are computed again in the backward pass."""
    peak_bytes: int
    """What the run is expected to take, of all chunks the most."""
    has_room_ahead: bool
    """Whether the next chunk's state may come while one still trains."""


class Budget:
    """What a run may take, and what it takes without chunks. `always` trains beside every chunk."""

    def __init__(
        self, limit: int, model: Any, engine: EngineLike, extent: Extent, pieces: Mapping[str, Piece], always: Spans
    ) -> None:
        if is_multimodal(model.config):
            raise UserError(
                "method.memory: what images, audio and video take is not foreseen; give method.chunk_bytes or num_chunks"
            )
        self.limit, self.extent, self.pieces, self.always = limit, extent, pieces, always
        self.usable = limit * (1 - MARGIN["accelerator" if engine.is_apart else "cpu"])
        self.blocks = [name for name, _ in blocks(model)]
        self.order = [name for name, _ in model.named_parameters()]
        output = model.get_output_embeddings()
        self.head = [name for name, p in model.named_parameters() if output is not None and p is output.weight]
        self.checkpoints_anyway = bool(model.is_gradient_checkpointing)
        engine.checkpoint_blocks(model, False)  # what is measured is what blocks keep without it
        engine.economize()
        self.held: float = engine.held_bytes()
        self.activations: Activations = engine.activations(model, extent.rows, extent.tokens)
        self.held = max(self.held, engine.held_bytes()) + bytes_of(always, pieces)

    def fit(self, pieces: Sequence[Piece], num_chunks: int | None) -> Fit:
        """As few chunks of these pieces as fit, or so many. Raises UserError that says what would fit."""
        total = sum(piece.bytes for piece in pieces)
        room = self.usable - self.held - self.activations.peak(len(self.blocks), (), True)
        number = num_chunks or max(1, min(len(pieces), int(total // room)) if room > 0 else len(pieces))
        smallest = None
        while True:
            try:
                chunks = cut(pieces, number)
            except UserError:
                if smallest is None:
                    raise
                raise UserError(self._too_little(smallest)) from None
            again = [self.peak(chunk, True) for chunk in chunks]
            plain = again if self.checkpoints_anyway else [self.peak(chunk, False) for chunk in chunks]
            best = max(map(min, plain, again))
            smallest = best if smallest is None else min(best, smallest)
            if best <= self.usable:
                checkpointing = [self.checkpoints_anyway or peak > self.usable for peak in plain]
                peak = max(b if on else a for a, b, on in zip(plain, again, checkpointing, strict=True))
                ahead = max(bytes_of(chunk, self.pieces) for chunk in chunks)
                return Fit(chunks, checkpointing, round(peak), peak + ahead <= self.usable)
            if num_chunks is not None:
                raise UserError(self._too_little(smallest))
            number += max(1, number // 8)

    def peak(self, chunk: Spans, checkpointing: bool) -> float:
        """Bytes at the peak while a chunk trains."""
        together = (*chunk, *self.always)
        places = {self._block(span.name) for span in together}
        # the head's gradient is summed over pieces of the batch, beside the piece's own, both in fp32
        sums = 8 * elements_of(tuple(span for span in together if span.name in self.head), self.pieces)
        return (
            self.held + bytes_of(chunk, self.pieces) + sums + self.activations.peak(min(places), places, checkpointing)
        )

    def _block(self, name: str) -> int:
        """Number of the block that a parameter belongs to; -1 before the first, and behind the last one more."""
        for number, block in enumerate(self.blocks):
            if name.startswith(block + "."):
                return number
        first = next(n for n, other in enumerate(self.order) if other.startswith(self.blocks[0] + "."))
        return -1 if self.order.index(name) < first else len(self.blocks)

    def _too_little(self, needed: float) -> str:
        def mib(number: float) -> str:
            return f"{number / 2**20:.0f} MiB"

        passes = self.activations.peak(0, (), True)
        return (
            f"method.memory: {mib(self.limit)} are too little: weights and what else is held take {mib(self.held)}, and "
            f"activations of {self.extent.rows} × {self.extent.tokens} tokens {mib(passes)}, computed again; with the smallest "
            f"chunk {mib(needed * self.limit / self.usable + 2**20)} would do. Give that, or lower train.micro_batch_tokens "
            "and data.max_tokens"
        )
