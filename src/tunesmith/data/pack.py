"""Samples to rows: best-fit packing, then rows of nearly equal length, so that hardly any token is padding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from tunesmith.data.samples import Samples
from tunesmith.types import Batch


def collate(samples: Samples, indices: Sequence[int], max_tokens: int, pack: bool) -> Batch:
    """One batch of the given samples. With `pack`, several share a row; else one sequence each.

    A row holds at most `max_tokens` tokens, or with preference pairs twice as many, and a pair never parts. Rows stand
    from long to short, so that neighbours that go through the model together need little padding.
    """
    groups = [samples.sequences(index) for index in indices]
    media = [samples.media_tensors(index) for index in indices] if samples.have_media else []
    media_N: tuple[dict[str, torch.Tensor], ...] = ()
    with_media = any(tensors for group in media for tensors in group)
    sizes = [sum(len(tokens) for tokens, _ in group) for group in groups]
    if pack and not with_media:  # some models count the positions of a whole row by its images
        packed = pack_rows(sizes, max_tokens * samples.group_size)
        rows = [[(n, sequence) for n in row for sequence in groups[n]] for row in packed]
    else:
        longest_first = np.argsort([-size for size in sizes], kind="stable").tolist()
        rows = [[(n, sequence)] for n in longest_first for sequence in groups[n]]
        media_N = tuple(tensors for n in longest_first for tensors in media[n]) if with_media else ()
    width = max(sum(len(tokens) for _, (tokens, _) in row) for row in rows)
    tokens_BT = np.zeros((len(rows), width), dtype=np.int64)
    positions_BT, sequence_BT = np.zeros_like(tokens_BT), np.full_like(tokens_BT, -1)
    weights_BT = np.zeros(tokens_BT.shape, np.float32)
    owners: list[int] = []
    for r, row in enumerate(rows):
        start = 0
        for n, (tokens, weights) in row:
            place = r, slice(start, start + len(tokens))
            tokens_BT[place], weights_BT[place] = tokens, weights
            positions_BT[place], sequence_BT[place] = np.arange(len(tokens)), len(owners)
            owners.append(n)
            start += len(tokens)
    first_seen = {n: group for group, n in enumerate(dict.fromkeys(owners))}
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT),
        positions_BT=torch.from_numpy(positions_BT),
        sequence_BT=torch.from_numpy(sequence_BT),
        weights_BT=torch.from_numpy(weights_BT),
        sample_N=torch.tensor([indices[n] for n in owners]),
        group_N=torch.tensor([first_seen[n] for n in owners]),
        media_N=media_N,
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
    """In linear time: rows stand in buckets by their free tokens, and a bit tells which buckets hold any."""
    rows: list[list[int]] = []
    buckets: list[list[int]] = [[] for _ in range(capacity + 1)]
    filled = 0  # bit f: buckets[f] holds a row
    for n in by_length:
        enough = filled >> lengths[n]
        if enough:
            free = lengths[n] + (enough & -enough).bit_length() - 1
            row = buckets[free].pop()
            if not buckets[free]:
                filled ^= 1 << free
            rows[row].append(n)
        else:
            free, row = capacity, len(rows)
            rows.append([n])
        left = free - lengths[n]
        buckets[left].append(row)
        filled |= 1 << left
    return rows


def _level(by_length: list[int], lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, row) for row in range(num_rows)]
    for n in by_length:
        used, row = heapq.heappop(heap)
        rows[row].append(n)
        heapq.heappush(heap, (used + lengths[n], row))
    return rows
