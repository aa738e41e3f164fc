"""Samples to rows: best-fit packing, then rows of nearly equal length, so that hardly any token is padding."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

import numpy as np
import torch

from tunesmith.data.samples import Samples
from tunesmith.types import Batch


def collate(samples: Samples, indices: Sequence[int], max_tokens: int, pack: bool) -> Batch:
    """One batch of the given samples. With `pack`, several share a row of at most `max_tokens`; else one each.

    Rows stand from long to short, so that neighbours that go through the model together need little padding.
    """
    lengths = [int(samples.offsets[i + 1] - samples.offsets[i]) for i in indices]
    rows = pack_rows(lengths, max_tokens) if pack else [[n] for n in np.argsort(lengths, kind="stable")[::-1].tolist()]
    width = max(sum(lengths[n] for n in row) for row in rows)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    positions, sequence, weights = np.zeros_like(tokens), np.full_like(tokens, -1), np.zeros(tokens.shape, np.float32)
    order: list[int] = []
    for r, row in enumerate(rows):
        start = 0
        for n in row:
            source = slice(samples.offsets[indices[n]], samples.offsets[indices[n] + 1])
            target = (r, slice(start, start + lengths[n]))
            tokens[target], weights[target] = samples.tokens[source], samples.weights[source]
            positions[target], sequence[target] = np.arange(lengths[n]), len(order)
            order.append(indices[n])
            start += lengths[n]
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        positions_BT=torch.from_numpy(positions),
        sequence_BT=torch.from_numpy(sequence),
        weights_BT=torch.from_numpy(weights),
        sample_N=torch.tensor(order),
        group_N=torch.arange(len(order)),
    )


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity`, as few as best-fit decreasing finds, levelled, long rows first.

    Best fit decides how many rows are needed; then the longest sequence goes to the emptiest row, which gives rows of
    nearly equal length. Where that overflows a row, the best fit stands.
    """
    by_length = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    fitted = _best_fit(by_length, lengths, capacity)
    levelled = _level(by_length, lengths, len(fitted))
    rows = levelled if max(_total(row, lengths) for row in levelled) <= capacity else fitted
    return sorted(rows, key=lambda row: -_total(row, lengths))


def _total(row: list[int], lengths: Sequence[int]) -> int:
    return sum(lengths[n] for n in row)


def _best_fit(by_length: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for n in by_length:
        at = bisect.bisect_left(free, (lengths[n], -1))
        if at == len(free):
            rows.append([n])
            left, row = capacity - lengths[n], len(rows) - 1
        else:
            left, row = free.pop(at)
            rows[row].append(n)
            left -= lengths[n]
        bisect.insort(free, (left, row))
    return rows


def _level(by_length: list[int], lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, row) for row in range(num_rows)]
    for n in by_length:
        used, row = heapq.heappop(heap)
        rows[row].append(n)
        heapq.heappush(heap, (used + lengths[n], row))
    return rows
