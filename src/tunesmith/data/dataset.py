"""`data(step)`: the batch of any step, a pure function of the samples, the seed and the step, made in O(batch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tunesmith.config import DataConfig
from tunesmith.data.order import permute, shares
from tunesmith.data.pack import collate
from tunesmith.data.samples import Samples
from tunesmith.types import Batch


@dataclass(frozen=True)
class Dataset:
    """Training samples as an endless sequence of epochs, each in its own order, cut into batches.

    A batch may span two epochs: no sample is skipped or seen twice at the border. The last one may be smaller.
    """

    samples: Samples
    config: DataConfig
    batch_size: int
    pack: bool
    seed: int
    last: int | None = None
    """So many samples in all, then it ends; None: endless."""
    share: bool = False
    """Whether the common beginning of a pair stands in a row once."""

    def __call__(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        return collate(self.samples, self.indices(step), self.config.max_tokens, self.pack, self.share)

    def at(self, step: int) -> tuple[Samples, list[int]]:
        """The samples of a step, by their numbers in a set."""
        return self.samples, self.indices(step)

    @cached_property
    def draws(self) -> list[int]:
        """How many samples of each set an epoch takes: all (or `repeat` times), or its share of the mixture."""
        sizes = [len(chosen) for chosen in self.samples.chosen]
        if self.config.mix == "concat":
            return [
                max(1, round(size * part.repeat)) if size else 0
                for size, part in zip(sizes, self.samples.sets, strict=True)
            ]
        power = 1 / self.config.temperature if self.config.temperature else 0.0
        weights = [part.weight * size**power for size, part in zip(sizes, self.samples.sets, strict=True)]
        return shares(sizes, weights, sum(sizes))

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch."""
        return sum(self.draws)

    @property
    def epoch_tokens(self) -> int:
        """Tokens in an epoch: exact where every sample comes equally often."""
        parts = zip(self.samples.parts, self.samples.chosen, self.draws, strict=True)
        return round(sum(draws * part.lengths()[chosen].sum(axis=1).mean() for part, chosen, draws in parts if draws))

    def indices(self, step: int) -> list[int]:
        """The samples of a step."""
        return self.indices_of(step, step + 1).tolist()

    def indices_of(self, first: int, behind: int) -> np.ndarray:
        """The samples of the steps from `first` to the one before `behind`, one after the other; int64.

        An epoch is a permutation of its draws. Draw d of a set is the d-th of an endless walk through the set, pass after
        pass, each in its own order: so every sample of a set is seen equally often, whatever the set's share.
        """
        start, stop = first * self.batch_size, behind * self.batch_size
        stop = stop if self.last is None else min(stop, self.last)
        epochs, positions = np.divmod(np.arange(start, stop), self.epoch_samples)
        found = np.zeros(stop - start, np.int64)
        ends = np.cumsum(self.draws)
        firsts = np.cumsum([0, *(len(chosen) for chosen in self.samples.chosen)])
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            slots = permute(positions[here], self.epoch_samples, self.seed, epoch)
            of_set = np.searchsorted(ends, slots, "right")
            for n in np.unique(of_set).tolist():
                mine, size = of_set == n, len(self.samples.chosen[n])
                draw = epoch * self.draws[n] + slots[mine] - (ends[n] - self.draws[n])
                found[here[mine]] = firsts[n] + self._walk(draw, size, n)
        return found

    def _walk(self, draws: np.ndarray, size: int, of_set: int) -> np.ndarray:
        """Draws of one set → its samples."""
        passes, positions = np.divmod(draws, size)
        found = np.zeros_like(draws)
        for number in np.unique(passes).tolist():
            here = passes == number
            found[here] = permute(positions[here], size, self.seed, of_set + 1, number)
        return found


@dataclass(frozen=True)
class EvaluationBatches(Sequence[Batch]):
    """All held-out samples in file order, each batch made when it is asked for."""

    samples: Samples
    batch_size: int
    max_tokens: int
    pack: bool
    share: bool

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __getitem__(self, number: Any) -> Any:
        start = range(0, len(self.samples), self.batch_size)[number]
        stop = min(start + self.batch_size, len(self.samples))
        return collate(self.samples, range(start, stop), self.max_tokens, self.pack, self.share)


def evaluation_batches(
    samples: Samples, batch_size: int, max_tokens: int, pack: bool, share: bool = False
) -> Sequence[Batch]:
    """All held-out samples in file order. Tokens are kept; pixels would fill the memory and are read each time."""
    batches = EvaluationBatches(samples, batch_size, max_tokens, pack, share)
    return batches if samples.have_media else list(batches)
