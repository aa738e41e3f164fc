"""Batches made by hand for the equality tests."""

from __future__ import annotations

import numpy as np
import torch

from tests.families import VOCABULARY
from tests.samples import make_samples
from tunesmith.data.pack import collate
from tunesmith.data.samples import Samples
from tunesmith.types import Batch


def ragged_samples(count: int = 8, shortest: int = 3) -> Samples:
    """Samples of `shortest` to 12 tokens whose loss weights are ragged: zeros, halves, ones and twos."""
    random = np.random.default_rng(0)
    lengths = random.integers(shortest, 13, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = random.integers(3, VOCABULARY, offsets[-1]).astype(np.int32)
    weights = random.choice(np.array([0.0, 0.5, 1.0, 2.0], np.float32), offsets[-1])
    weights[offsets[:-1]] = 0.0
    weights[offsets[:-1] + 1] = 1.0
    borders = offsets[1:-1]
    return make_samples(np.split(tokens, borders), np.split(weights, borders))


def ragged_batch(pack: bool, shortest: int = 3) -> Batch:
    return collate(ragged_samples(8, shortest), range(8), max_tokens=16, pack=pack)


def left_padded(batch: Batch) -> Batch:
    """The same sequences, one a row, with the padding at the left."""
    pieces = {"tokens_BT": 0, "positions_BT": 0, "sequence_BT": -1, "weights_BT": 0}
    moved = {name: torch.full_like(getattr(batch, name), fill) for name, fill in pieces.items()}
    for row, end in enumerate(batch.row_ends()):
        for name, target in moved.items():
            target[row, target.shape[1] - end :] = getattr(batch, name)[row, :end]
    return Batch(**moved, sample_N=batch.sample_N, group_N=batch.group_N)
