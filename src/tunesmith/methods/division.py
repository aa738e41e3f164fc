"""A zeroth-order step over several ranks: who scores what, and what comes of it.

A step is a grid of queries × samples. Ranks part it by queries where there are enough, else by samples. What a rank has found
is a table: for each of its K states the loss and the metrics, as sums over its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.types import Batch

Table = dict[str, Any]
"""`losses` [K]; `share`, how much of the batch was counted; metrics by name, [K] or [K, 2]."""


@dataclass(frozen=True)
class Division:
    """How a step is parted among the ranks that are there at its start."""

    ranks: tuple[int, ...]
    queries: int

    @property
    def by_queries(self) -> bool:
        return self.queries >= len(self.ranks)

    def queries_of(self, rank: int) -> range:
        """Neighbouring ones, so that the ranks' queries end to end are those of one process."""
        if not self.by_queries:
            return range(self.queries)
        place, number = self.ranks.index(rank), len(self.ranks)
        return range(self.queries * place // number, self.queries * (place + 1) // number)

    def samples_of(self, rank: int, batch: Batch) -> list[Batch]:
        """This rank's part of a batch, if there is one for it."""
        if self.by_queries:
            return [batch]
        place = self.ranks.index(rank)
        return batch.parts(len(self.ranks))[place : place + 1]

    def put_together(self, tables: Mapping[int, Table]) -> list[tuple[range, Table]]:
        """The tables of those who answered, as (queries, over all samples). What the others should have found is missing: of
        queries it is left out, and for samples the others stand in, each for as much as it counts."""
        if self.by_queries:
            return [(self.queries_of(rank), table) for rank, table in tables.items()]
        total: Table = {}
        for table in tables.values():
            for name, value in table.items():
                total[name] = _sum(total[name], value) if name in total else value
        if len(tables) < len(self.ranks) and total["share"]:
            total["losses"] = [loss / total["share"] for loss in total["losses"]]
        return [(range(self.queries), total)]


def table_of(found: Mapping[str, Tensor]) -> Table:
    """Numbers as every rank reads them."""
    return {name: value.tolist() for name, value in found.items()}


def mean(rows: Iterable[Any]) -> Any:
    """Of numbers, or of pairs place by place; in order, so that all ranks come to the same bits."""
    rows = list(rows)
    if isinstance(rows[0], list):
        return [mean(column) for column in zip(*rows, strict=True)]
    return sum(rows) / len(rows)


def _sum(a: Any, b: Any) -> Any:
    """Of numbers, or of lists of one shape."""
    return [_sum(x, y) for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A hash of all their bits that is cheap wherever they lie: the sums of their numbers, read as integers."""
    total = 0
    for x in tensors:
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        total = (total * 1_000_003 + int(x.detach().view(whole).sum(dtype=torch.int64))) % 2**63
    return total


def check_equal(fingerprints: Mapping[int, int], step: int) -> None:
    """Raises UserError, on all ranks the same, where some hold other weights."""
    holders: dict[int, list[int]] = {}
    for rank, found in fingerprints.items():
        holders.setdefault(found, []).append(rank)
    if len(holders) > 1:
        said = "; ".join(f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))}" for ranks in holders.values())
        raise UserError(
            f"before step {step + 1} the ranks do not all hold the same weights, but these among themselves: {said}. The run "
            "has stopped; --resume makes the weights anew from the log, on machines of one kind (engine.check_every)"
        )
