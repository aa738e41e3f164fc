"""Training data that the held-out data knows already: equal prompts, and texts that are nearly the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tunesmith.inspect.words import NUM_HASHES

BAND = 4
"""Signature numbers that must all agree for two texts to be compared: at a similarity of 0.7, one of the 16 bands does so
in 98.8 of 100 cases (1 - (1 - 0.7^4)^16), and texts that share little are not compared at all."""
SIMILAR = 0.7


@dataclass(frozen=True)
class Pair:
    """A held-out record and a training record that are alike; both as numbers among the records of their side."""

    held_out: int
    train: int
    similarity: float


def same_prompts(held_out: np.ndarray, train: np.ndarray) -> list[Pair]:
    """For each held-out record whose prompt hash (uint64, 0: no prompt) stands in the training data, the first such record."""
    order = np.argsort(train, kind="stable")
    at = _find(train[order], held_out)
    return [Pair(int(n), int(order[at[n]]), 1.0) for n in np.flatnonzero((at >= 0) & (held_out != 0))]


def near_duplicates(held_out: np.ndarray, train: np.ndarray) -> list[Pair]:
    """For each held-out record that is much like a training record, the likest found. Signatures uint32 [records, 64].

    Linear in both: of each band only one training record with the same four numbers is compared.
    """
    best = np.zeros(len(held_out))
    partner = np.zeros(len(held_out), np.int64)
    for start in range(0, NUM_HASHES, BAND):
        mine, theirs = _band(held_out, start), _band(train, start)
        order = np.argsort(theirs, kind="stable")
        at = _find(theirs[order], mine)
        hits = np.flatnonzero((at >= 0) & held_out.any(axis=1))
        others = order[at[hits]]
        shared = (held_out[hits] == train[others]).mean(axis=1)
        better = shared > best[hits]
        best[hits[better]], partner[hits[better]] = shared[better], others[better]
    return [Pair(int(n), int(partner[n]), float(best[n])) for n in np.flatnonzero(best >= SIMILAR)]


def _band(signatures: np.ndarray, start: int) -> np.ndarray:
    """A band's four numbers as one, uint64 [records]."""
    halves = np.ascontiguousarray(signatures[:, start : start + BAND]).view(np.uint64)
    return halves[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ halves[:, 1]


def _find(ordered: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted value first stands in the ordered ones, or -1; int64."""
    if not len(ordered):
        return np.full(len(wanted), -1)
    at = np.searchsorted(ordered, wanted)
    found = ordered[np.minimum(at, len(ordered) - 1)] == wanted
    return np.where(found, at, -1)
