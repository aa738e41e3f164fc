"""Chunks of a model's parameters: laid end to end in the order of the model, and cut at rows.

A chunk is a run of whole parameters with at most two that are cut, one at each end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from math import prod

from tunesmith.errors import UserError


@dataclass(frozen=True)
class Piece:
    """A parameter that trains, as the partition sees it."""

    name: str
    shape: tuple[int, ...]
    gradient_bytes: int
    """Of the gradient of one number."""
    state_bytes: float
    """Of its master copy and optimizer state."""
    align: int
    """It can be cut at multiples of so many rows; 0: not at all."""

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> float:
        """What training a row (an index of the first dimension) costs."""
        return (self.gradient_bytes + self.state_bytes) * prod(self.shape[1:])

    @property
    def bytes(self) -> float:
        return self.row_bytes * self.rows

    @property
    def smallest_bytes(self) -> float:
        """Of what cannot be divided further."""
        return self.row_bytes * (min(self.align, self.rows) if self.align else self.rows)


@dataclass(frozen=True)
class Span:
    """Rows start … stop-1 of a parameter."""

    name: str
    start: int
    stop: int

    @property
    def key(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}]"


Spans = tuple[Span, ...]
"""Of a chunk."""


def cut(pieces: Sequence[Piece], num_chunks: int) -> list[Spans]:
    """Chunks of as equal bytes as aligned cuts allow. Raises UserError if there are not so many."""
    ends = list(accumulate(piece.bytes for piece in pieces))
    inner = (_border(pieces, ends, ends[-1] * k / num_chunks) for k in range(1, num_chunks))
    borders = sorted({(0, 0), *inner, (len(pieces), 0)})
    if len(borders) != num_chunks + 1:
        raise UserError(
            f"method.num_chunks: the {len(pieces)} parameters give {len(borders) - 1} chunks at most when cut into "
            f"{num_chunks}; ask for fewer, or set method.row_alignment lower"
        )
    chunks = []
    for (first, start), (last, stop) in pairwise(borders):
        spans = []
        for index in range(first, min(last + 1, len(pieces))):
            piece = pieces[index]
            span = Span(piece.name, start if index == first else 0, stop if index == last else piece.rows)
            if span.start < span.stop:
                spans.append(span)
        chunks.append(tuple(spans))
    return chunks


def cut_within(pieces: Sequence[Piece], chunk_bytes: float, setting: str) -> list[Spans]:
    """As few chunks as keep each within `chunk_bytes`. Raises UserError that names the parameter which is too large."""
    largest = max(pieces, key=lambda piece: piece.smallest_bytes)
    if largest.smallest_bytes > chunk_bytes:
        part = f"{largest.align} rows of it" if 0 < largest.align < largest.rows else "it cannot be cut:"
        raise UserError(
            f"{setting}: {chunk_bytes / 2**20:.1f} MiB are too little for {largest.name} {list(largest.shape)}: {part} take "
            f"{largest.smallest_bytes / 2**20:.1f} MiB with gradient and optimizer state; give more, or set method.state to "
            "reset and the optimizer to one with less state (lion, sgd)"
        )
    by_name = {piece.name: piece for piece in pieces}
    filled = _filled(pieces, chunk_bytes)
    try:
        equal = cut(pieces, len(filled))
    except UserError:
        return filled
    return equal if max(bytes_of(chunk, by_name) for chunk in equal) <= chunk_bytes else filled


def by_layers(pieces: Sequence[Piece], block_names: Sequence[str]) -> list[Spans]:
    """A chunk of each block, and of each run of parameters outside of blocks."""

    def block_of(piece: Piece) -> str | None:
        return next((block for block in block_names if piece.name.startswith(block + ".")), None)

    return [tuple(Span(piece.name, 0, piece.rows) for piece in run) for _, run in groupby(pieces, key=block_of)]


def bytes_of(chunk: Spans, pieces: Mapping[str, Piece]) -> float:
    """What training a chunk costs."""
    return sum((span.stop - span.start) * pieces[span.name].row_bytes for span in chunk)


def elements_of(chunk: Spans, pieces: Mapping[str, Piece]) -> int:
    """Numbers that train in a chunk."""
    return sum((span.stop - span.start) * prod(pieces[span.name].shape[1:]) for span in chunk)


def _border(pieces: Sequence[Piece], ends: Sequence[float], wanted: float) -> tuple[int, int]:
    """(parameter, row) of the cut nearest to so many bytes from the start; row 0 where it falls between two parameters."""
    index = bisect_right(ends, wanted)
    piece = pieces[index]
    align = piece.align if 0 < piece.align < piece.rows else piece.rows
    row = min(piece.rows, round((wanted - ends[index] + piece.bytes) / piece.row_bytes / align) * align)
    return (index + 1, 0) if row == piece.rows else (index, row)


def _filled(pieces: Sequence[Piece], chunk_bytes: float) -> list[Spans]:
    """Chunks filled up from the start: the fewest there can be, but the last may be small."""
    chunks: list[Spans] = []
    spans: list[Span] = []
    left = chunk_bytes
    for piece in pieces:
        align = piece.align if 0 < piece.align < piece.rows else piece.rows
        start = 0
        while start < piece.rows:
            fitting = min(piece.rows - start, int(left // (align * piece.row_bytes)) * align)
            if left >= (piece.rows - start) * piece.row_bytes:
                fitting = piece.rows - start
            if not fitting:
                chunks.append(tuple(spans))
                spans, left = [], chunk_bytes
                continue
            spans.append(Span(piece.name, start, start + fitting))
            start, left = start + fitting, left - fitting * piece.row_bytes
    return [*chunks, tuple(spans)] if spans else chunks
