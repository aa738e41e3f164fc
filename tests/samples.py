"""Tokenized samples by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.config import SetConfig
from tunesmith.data.samples import Counts, Part, Samples, whole


def make_part(
    tokens: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None = None,
    group_size: int = 1,
    name: str = "a",
    labels: Sequence[float] | None = None,
    choices: Sequence[Sequence[int]] | None = None,
) -> Part:
    """Sequences of tokens; weights are 1 where none are given. The content hash of a sample is its number, its line too."""
    weights = weights or [[1.0] * len(sequence) for sequence in tokens]
    flat = np.array([token for sequence in tokens for token in sequence], np.int32)
    number = len(tokens) // group_size
    return Part(
        name=name,
        tokens=flat,
        weights=np.array([weight for sequence in weights for weight in sequence], np.float32),
        offsets=np.cumsum([0, *map(len, tokens)]),
        content=np.arange(number, dtype=np.uint64),
        file=np.zeros(number, np.int32),
        line=np.arange(number),
        label=np.array(labels or [0.0] * number, np.float32),
        files=(name,),
        group_size=group_size,
        fingerprint=name,
        max_token=int(flat.max(initial=-1)),
        counts=Counts(records=number),
        choices=None if choices is None else np.array([word for words in choices for word in words], np.int32),
        choices_at=None if choices is None else np.cumsum([0, *map(len, choices)]),
    )


def make_samples(
    tokens: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None = None,
    group_size: int = 1,
    labels: Sequence[float] | None = None,
    choices: Sequence[Sequence[int]] | None = None,
) -> Samples:
    """One data set of the given sequences."""
    return whole([make_part(tokens, weights, group_size, labels=labels, choices=choices)], [SetConfig(path="a")])
