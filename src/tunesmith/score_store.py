"""Numbers about target tokens, made once and kept in memory-mapped files: a reference's log-probabilities, a teacher's top k.

They are keyed by the content of each sequence, its tokens and which of them are targets. So the order of the data does not
matter, nor how it is packed, and a folder can be made on one machine and used on another.
Shapes: Q sequences, N targets of all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.types import Batch

INDEX = "index.json"


@dataclass(frozen=True)
class ScoreStore:
    """What a StoreWriter wrote."""

    folder: Path
    facts: dict[str, Any]
    """What the writer was told, such as which model it was."""
    keys: np.ndarray
    """uint64 [Q], sorted."""
    starts: np.ndarray
    """int64 [Q + 1]: sequence q's targets are starts[q] … starts[q] + sizes[q] - 1."""
    sizes: np.ndarray
    arrays: dict[str, np.ndarray]
    """[N, …] each."""

    @classmethod
    def open(cls, folder: Path) -> ScoreStore:
        """Raises UserError for a folder that is not whole."""
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            arrays: dict[str, np.ndarray] = {
                name: np.memmap(folder / f"{name}.bin", kind, mode="r", shape=tuple(shape))
                for name, (kind, shape) in index["arrays"].items()
            }
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder}: no stored scores, or not whole: {error}; remove it, and they are made anew"
            ) from error
        return cls(folder, index["facts"], arrays.pop("keys"), arrays.pop("starts"), arrays.pop("sizes"), arrays)

    def num_bytes(self) -> int:
        """On disk."""
        return sum(array.nbytes for array in self.arrays.values())

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """For each array a token column [B, T, …], 0 beside the targets. Raises UserError if a sequence is missing."""
        row_M, column_M = (batch.weights_BT != 0).nonzero(as_tuple=True)
        owner_M = batch.sequence_BT[row_M, column_M]
        at_M = torch.zeros(len(owner_M), dtype=torch.long)
        for n, key in enumerate(content_keys(batch)):
            mine = owner_M == n
            at_M[mine] = self._find(key, int(mine.sum())) + torch.arange(int(mine.sum()))
        found: dict[str, Tensor] = {}
        for name, array in self.arrays.items():
            values = torch.from_numpy(array[at_M.numpy()])
            column = torch.zeros(*batch.tokens_BT.shape, *values.shape[1:], dtype=values.dtype)
            column[row_M, column_M] = values
            found[name] = column
        return found

    def check_holds(self, batches: Iterable[Batch]) -> None:
        """Raises UserError if a sequence of the batches is missing."""
        for batch in batches:
            numbers = batch.sequence_BT[batch.weights_BT != 0].bincount(minlength=len(batch.sample_N)).tolist()
            for key, number in zip(content_keys(batch), numbers, strict=True):
                self._find(key, number)

    def _find(self, key: int, number: int) -> int:
        """Where a sequence's targets begin; `number`: how many they are."""
        at = int(np.searchsorted(self.keys, np.uint64(key)))
        if not number:
            return 0
        if at == len(self.keys) or self.keys[at] != key or self.sizes[at] != number:
            raise UserError(
                f"{self.folder}: holds nothing about a sample with {number} targets: it was made from other data, or with "
                "another tokenizer, chat template or data.max_tokens; make it anew"
            )
        return int(self.starts[at])


class StoreWriter:
    """Appends the targets' numbers batch by batch; `close` makes the folder whole."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.facts = folder, facts
        self.kinds: dict[str, tuple[str, list[int]]] = {}
        self.places: dict[int, tuple[int, int]] = {}
        self.number = 0

    def add(self, batch: Batch, values: dict[str, Tensor]) -> None:
        """values: name → [targets of the batch, …], row by row."""
        row_M, column_M = (batch.weights_BT != 0).nonzero(as_tuple=True)
        owner_M = batch.sequence_BT[row_M, column_M]
        for n, key in enumerate(content_keys(batch)):
            mine = (owner_M == n).nonzero()[:, 0]
            if len(mine):  # a sequence's targets stand next to each other
                self.places[key] = self.number + int(mine[0]), len(mine)
        for name, value in values.items():
            array = value.numpy()
            self.kinds.setdefault(name, (array.dtype.str, list(array.shape[1:])))
            with (self.folder / f"{name}.bin").open("ab") as stream:
                stream.write(np.ascontiguousarray(array).tobytes())
        self.number += len(owner_M)

    def close(self) -> ScoreStore:
        """Write the index, and open what is there now."""
        keys = np.array(sorted(self.places), np.uint64)
        index = {
            "keys": keys,
            "starts": np.array([self.places[int(key)][0] for key in keys], np.int64),
            "sizes": np.array([self.places[int(key)][1] for key in keys], np.int64),
        }
        arrays = {name: (kind, [self.number, *shape]) for name, (kind, shape) in self.kinds.items()}
        for name, array in index.items():
            (self.folder / f"{name}.bin").write_bytes(array.tobytes())
            arrays[name] = (array.dtype.str, list(array.shape))
        (self.folder / INDEX).write_text(json.dumps({"facts": self.facts, "arrays": arrays}), encoding="utf-8")
        return ScoreStore.open(self.folder)


def content_keys(batch: Batch) -> list[int]:
    """64 bits of each sequence: its tokens, which of them are targets, and its images or sounds."""
    keys = []
    for n, (tokens, weights) in enumerate(batch.sequences()):
        digest = hashlib.blake2b(tokens.numpy().astype("<i4").tobytes(), digest_size=8)
        digest.update(np.packbits(weights.numpy() != 0).tobytes())
        for name, media in sorted(batch.media_N[n].items()) if batch.media_N else ():
            digest.update(name.encode() + media.float().numpy().tobytes())
        keys.append(int.from_bytes(digest.digest(), "little"))
    return keys
