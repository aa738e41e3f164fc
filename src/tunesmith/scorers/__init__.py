"""The table of scorers: how one batch is scored under several nearby parameter states."""

from __future__ import annotations

from tunesmith.scorers.base import Scorer
from tunesmith.scorers.batched import BatchedScorer
from tunesmith.scorers.in_place import InPlaceScorer
from tunesmith.scorers.vllm import VllmScorer

SCORERS: dict[str, type[Scorer]] = {"batched": BatchedScorer, "in_place": InPlaceScorer, "vllm": VllmScorer}

__all__ = ["SCORERS", "Scorer"]
