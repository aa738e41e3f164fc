"""The order of samples as a function: position in an epoch → sample, without an array that would have to be kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 6
GOLDEN, MIX_1, MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permute(positions: Sequence[int] | np.ndarray, size: int, *key: int) -> np.ndarray:
    """Images of `positions` (each in 0 … size-1) under the permutation of 0 … size-1 that `key` names; int64, same shape.

    A Feistel network over the next power of four, walked until it comes back into range (Black & Rogaway 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [_hash(np.array([n], np.uint64), *key) for n in range(ROUNDS)]
    values = np.asarray(positions, np.uint64).copy()
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele et al. 2014)."""
    values = values + GOLDEN
    values = (values ^ (values >> np.uint64(30))) * MIX_1
    values = (values ^ (values >> np.uint64(27))) * MIX_2
    return values ^ (values >> np.uint64(31))


def _hash(values: np.ndarray, *key: int) -> np.ndarray:
    for part in key:
        values = _mix(values ^ np.uint64(part % 2**64))
    return _mix(values)


def shares(sizes: Sequence[int], weights: Sequence[float], total: int) -> list[int]:
    """`total` parted in proportion to `weights`, by largest remainder; a set without samples gets none."""
    wanted = np.array([weight if size else 0.0 for size, weight in zip(sizes, weights, strict=True)])
    exact = total * wanted / wanted.sum()
    parts = np.floor(exact).astype(int)
    for index in np.argsort(parts - exact, kind="stable")[: total - parts.sum()]:
        parts[index] += 1
    return parts.tolist()
