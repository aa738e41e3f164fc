"""`data(step)`: the batch of any step, a pure function of the samples, the seed and the step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tunesmith.data.pack import collate
from tunesmith.data.samples import Samples
from tunesmith.types import Batch


@dataclass(frozen=True)
class Dataset:
    """Training samples as an endless sequence of epochs, each in its own order, cut into batches.

    A batch may span two epochs: no sample is skipped or seen twice at the border. The last one may be smaller.
    """

    samples: Samples
    batch_size: int
    max_tokens: int
    pack: bool
    seed: int
    last: int | None = None
    """So many samples in all, then it ends; None: endless."""

    def __call__(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        return collate(self.samples, self.indices(step), self.max_tokens, self.pack)

    def indices(self, step: int) -> list[int]:
        """The samples of a step."""
        start = step * self.batch_size
        stop = start + self.batch_size if self.last is None else min(start + self.batch_size, self.last)
        return [self._at(position) for position in range(start, stop)]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.samples))
        return _order(len(self.samples), self.seed, epoch)[index]


def evaluation_batches(samples: Samples, batch_size: int, max_tokens: int, pack: bool) -> list[Batch]:
    """All held-out samples in file order."""
    starts = range(0, len(samples), batch_size)
    return [collate(samples, range(start, min(start + batch_size, len(samples))), max_tokens, pack) for start in starts]


@lru_cache(maxsize=4)
def _order(num_samples: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_samples, generator=generator).tolist()
