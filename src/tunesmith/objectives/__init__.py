"""The table of objectives. To add one: a file here, a line in the table, its config class."""

from __future__ import annotations

from typing import Any

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pretrain import Pretrain
from tunesmith.objectives.sft import Sft

OBJECTIVES: dict[str, type[Objective]] = {"sft": Sft, "pretrain": Pretrain}


def build_objective(config: Any) -> Objective:
    """The objective that a config section names."""
    return OBJECTIVES[config.name](config)


__all__ = ["OBJECTIVES", "Objective", "build_objective"]
