"""The batch of a run that takes the most memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.assemble import Run
from tunesmith.data.dataset import Dataset
from tunesmith.types import Batch

LOOKED_AT = 20_000
"""Steps of a run whose lengths are looked at; of a longer one those of its first ones."""
AT_ONCE = 1000
"""Steps whose samples are drawn together."""
TRIED = 8
"""Of these the batches that are made."""


def worst_batch(run: Run) -> Batch:
    """That with the largest micro-batch. Of a stream, whose end nobody knows, the first."""
    if not isinstance(run.data, Dataset):
        return run.data(0)
    steps = worst_steps(run)
    batches = [run.data(step) for step in steps]
    return max(batches, key=lambda batch: size(pieces(run, batch)))


def worst_steps(run: Run) -> list[int]:
    """The few steps among which it is, by the lengths of their samples alone."""
    data = run.data
    assert isinstance(data, Dataset), "a stream's samples are not known"
    lengths = data.samples.lengths().sum(1)
    number = min(run.steps, LOOKED_AT)
    found = []
    for first in range(0, number, AT_ONCE):
        own = lengths[data.indices_of(first, min(first + AT_ONCE, number))]
        begins = np.arange(0, len(own), data.batch_size)
        found.append(np.stack([np.maximum.reduceat(own, begins), np.add.reduceat(own, begins)]))
    longest, whole = np.concatenate(found, axis=1)
    by_longest, by_whole = np.lexsort((-whole, -longest)), np.lexsort((-longest, -whole))
    return list(dict.fromkeys((*by_longest[:TRIED].tolist(), *by_whole[:TRIED].tolist())))


def pieces(run: Run, batch: Batch) -> list[Batch]:
    """Micro-batches of all ranks: each of them finds the same batch to be the largest."""
    parts = batch.parts(run.learner.engine.world)
    return [piece for part in parts for piece in part.split(run.learner.micro_batch_tokens)]


def largest_first(pieces: Sequence[Batch]) -> list[Batch]:
    """Micro-batches by their tokens, padding included; of equal ones that with the longest row."""
    return sorted(pieces, key=lambda piece: (piece.tokens_BT.numel(), piece.tokens_BT.shape[1]), reverse=True)


def size(pieces: Sequence[Batch]) -> tuple[int, int, int]:
    """What micro-batches are compared by: tokens of the largest, its longest row, targets."""
    largest = largest_first(pieces)[0]
    return largest.tokens_BT.numel(), largest.tokens_BT.shape[1], int((largest.weights_BT != 0).sum())
