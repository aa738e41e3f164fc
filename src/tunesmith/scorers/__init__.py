"""The table of scorers: how one batch is scored under several nearby parameter states."""

from __future__ import annotations

from tunesmith.scorers.base import Scorer
from tunesmith.scorers.batched import BatchedScorer
from tunesmith.scorers.in_place import InPlaceScorer

SCORERS: dict[str, type[Scorer]] = {"batched": BatchedScorer, "in_place": InPlaceScorer}

__all__ = ["SCORERS", "Scorer"]
