"""The table of objectives. To add one: a file here, a line in the table, its config class."""

from __future__ import annotations

from typing import Any

from tunesmith.objectives.answer import Answer
from tunesmith.objectives.base import Objective
from tunesmith.objectives.bco import Bco
from tunesmith.objectives.classify import Classify
from tunesmith.objectives.cpo import Cpo
from tunesmith.objectives.distill import Distill
from tunesmith.objectives.dpo import Dpo
from tunesmith.objectives.kto import Kto
from tunesmith.objectives.orpo import Orpo
from tunesmith.objectives.pretrain import Pretrain
from tunesmith.objectives.prm import Prm
from tunesmith.objectives.reward import Reward
from tunesmith.objectives.sft import Sft
from tunesmith.objectives.simpo import Simpo

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": Sft,
    "pretrain": Pretrain,
    "dpo": Dpo,
    "orpo": Orpo,
    "simpo": Simpo,
    "cpo": Cpo,
    "kto": Kto,
    "bco": Bco,
    "reward": Reward,
    "prm": Prm,
    "classify": Classify,
    "answer": Answer,
    "distill": Distill,
}


def build_objective(config: Any) -> Objective:
    """The objective that a config section names."""
    return OBJECTIVES[config.name](config)


__all__ = ["OBJECTIVES", "Objective", "build_objective"]
