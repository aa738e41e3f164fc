"""Samples to rows: best-fit packing, then rows of nearly equal length, so that hardly any token is padding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tunesmith.data.samples import Samples
from tunesmith.types import Batch


@dataclass(frozen=True)
class Segment:
    """What a row holds of one sequence."""

    sample: int
    """Which of the batch's samples it belongs to, counted from 0."""
    tokens: np.ndarray
    weights: np.ndarray
    shared: int = 0
    """So many of the first tokens stand in the row already, as those of the group's first sequence."""


def collate(samples: Samples, indices: Sequence[int], max_tokens: int, pack: bool, share: bool = False) -> Batch:
    """One batch of the given samples. With `pack`, several share a row; else one sequence each.

    A row holds at most `max_tokens` tokens, or with preference pairs twice as many, and a pair never parts. With `share`, the
    beginning that both of a pair have in common stands in the row once. Rows stand from long to short, so that neighbours
    that go through the model together need little padding.
    """
    media = [samples.media_tensors(index) for index in indices] if samples.have_media else []
    with_media = any(tensors for group in media for tensors in group)
    if with_media:  # some models count the positions of a whole row by its images
        pack = share = False
    groups = [_segments(n, samples.sequences(index), share) for n, index in enumerate(indices)]
    sizes = [sum(len(segment.tokens) - segment.shared for segment in group) for group in groups]
    if pack:
        packed = pack_rows(sizes, max_tokens * samples.group_size)
        rows = [[segment for n in row for segment in groups[n]] for row in packed]
        media_N: tuple[dict[str, torch.Tensor], ...] = ()
    else:
        longest_first = np.argsort([-size for size in sizes], kind="stable").tolist()
        rows = [row for n in longest_first for row in _rows_of(groups[n])]
        media_N = tuple(tensors for n in longest_first for tensors in media[n]) if with_media else ()
    batch = _lay_out(rows)
    sample_N = torch.tensor([indices[n] for n in batch.sample_N.tolist()])
    label_N = torch.tensor([samples.label(index) for index in sample_N.tolist()], dtype=torch.float32)
    batch = replace(batch, sample_N=sample_N, media_N=media_N).with_columns(sequences={"label": label_N})
    return _with_choices(batch, samples)


def batch_of(sequences: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
    """A batch of (tokens, weights), one sequence a row, long rows first; sequence n is the n-th of the list."""
    longest_first = sorted(range(len(sequences)), key=lambda n: -len(sequences[n][0]))
    batch = _lay_out([[Segment(n, sequences[n][0].numpy(), sequences[n][1].numpy())] for n in longest_first])
    numbers = torch.tensor([*longest_first, -1])  # the last one stands for padding
    at = torch.arange(len(sequences))
    return replace(batch, sequence_BT=numbers[batch.sequence_BT], sample_N=at, group_N=at)


def _segments(n: int, sequences: Sequence[tuple[np.ndarray, np.ndarray]], share: bool) -> list[Segment]:
    """A group's segments; with `share` all but the first go without what they have in common with it."""
    shared = _common_beginning(sequences) if share and len(sequences) > 1 else 0
    return [Segment(n, tokens, weights, shared if k else 0) for k, (tokens, weights) in enumerate(sequences)]


def _common_beginning(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
    """How many tokens all begin with, none of them a target, and each with at least one token of its own after them."""
    stop = min(len(tokens) for tokens, _ in sequences) - 1
    first, _ = sequences[0]
    for tokens, weights in sequences:
        differs = (tokens[:stop] != first[:stop]) | (weights[:stop] != 0)
        stop = int(differs.argmax()) if differs.any() else stop
    return stop


def _rows_of(group: list[Segment]) -> list[list[Segment]]:
    """Without packing: a row for each sequence, or one for those that share their beginning."""
    return [group] if any(segment.shared for segment in group) else [[segment] for segment in group]


def _lay_out(rows: Sequence[Sequence[Segment]]) -> Batch:
    """The rows as tensors. `sample_N` holds the segments' samples, and groups are numbered as they come."""
    width = max(sum(len(segment.tokens) - segment.shared for segment in row) for row in rows)
    tokens_BT = np.zeros((len(rows), width), dtype=np.int64)
    positions_BT, sequence_BT = np.zeros_like(tokens_BT), np.full_like(tokens_BT, -1)
    weights_BT = np.zeros(tokens_BT.shape, np.float32)
    owners: list[int] = []
    parents: list[int] = []
    prefixes: list[int] = []
    first_of: dict[int, int] = {}
    for r, row in enumerate(rows):
        start = 0
        for segment in row:
            first_of.setdefault(segment.sample, len(owners))
            stop = start + len(segment.tokens) - segment.shared
            place = r, slice(start, stop)
            tokens_BT[place], weights_BT[place] = segment.tokens[segment.shared :], segment.weights[segment.shared :]
            positions_BT[place], sequence_BT[place] = np.arange(segment.shared, len(segment.tokens)), len(owners)
            parents.append(first_of[segment.sample] if segment.shared else len(owners))
            prefixes.append(segment.shared)
            owners.append(segment.sample)
            start = stop
    group_of = {n: group for group, n in enumerate(dict.fromkeys(owners))}
    shares = any(prefixes)
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT),
        positions_BT=torch.from_numpy(positions_BT),
        sequence_BT=torch.from_numpy(sequence_BT),
        weights_BT=torch.from_numpy(weights_BT),
        sample_N=torch.tensor(owners),
        group_N=torch.tensor([group_of[n] for n in owners]),
        parent_N=torch.tensor(parents) if shares else None,
        prefix_N=torch.tensor(prefixes) if shares else None,
    )


def _with_choices(batch: Batch, samples: Samples) -> Batch:
    """The batch with the label words' tokens at each target, where the samples have any."""
    words = [samples.choices(index) for index in batch.sample_N.tolist()]
    most = max(map(len, words))
    if not most:
        return batch
    of_sequence = torch.full((len(words), most), -1)
    for n, tokens in enumerate(words):
        of_sequence[n, : len(tokens)] = torch.from_numpy(np.asarray(tokens, np.int64))
    at_target = (batch.weights_BT != 0)[..., None]
    return batch.with_columns(tokens={"choices": torch.where(at_target, of_sequence[batch.sequence_BT], -1)})


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
