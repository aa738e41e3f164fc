"""The table of engines. To add one: a file here, a line in the table, its config class."""

from __future__ import annotations

from typing import Any

from tunesmith.engines.fsdp import FsdpEngine
from tunesmith.engines.replicas import ReplicasEngine
from tunesmith.engines.single import SingleEngine

ENGINES: dict[str, type[SingleEngine]] = {"single": SingleEngine, "replicas": ReplicasEngine, "fsdp": FsdpEngine}


def build_engine(config: Any, precision: str) -> SingleEngine:
    """The engine that a config section names. `precision` is resolved: fp32, bf16 or mixed."""
    return ENGINES[config.name](config, precision)


__all__ = ["ENGINES", "build_engine"]
