"""The table of engines. To add one: a file here, a line in the table, its config class."""

from __future__ import annotations

from typing import Any

from tunesmith.config import FsdpConfig, ReplicasConfig, RunConfig, SingleConfig
from tunesmith.engines.fsdp import FsdpEngine
from tunesmith.engines.place import place
from tunesmith.engines.replicas import ReplicasEngine
from tunesmith.engines.single import SingleEngine
from tunesmith.errors import UserError

ENGINES: dict[str, type[SingleEngine]] = {"single": SingleEngine, "replicas": ReplicasEngine, "fsdp": FsdpEngine}


def with_engine(config: RunConfig) -> RunConfig:
    """The configuration with an engine in place of auto. Raises UserError for several processes that know nothing of each
    other."""
    engine, world = config.engine, place().world
    if engine.name == "single" and world > 1:
        raise UserError(
            f"engine: single runs on one device, but {world} processes were started, which would all do the same work; set "
            "engine to auto, or start one"
        )
    if engine.name != "auto":
        return config
    shared: dict[str, Any] = {
        "device": engine.device,
        "activation_checkpointing": engine.activation_checkpointing,
        "compile": engine.compile,
    }
    chosen: Any = SingleConfig(**shared) if world == 1 else _shards_or_copies(config, FsdpConfig(**shared), world)
    if world > 1 and config.method.name == "zeroth":
        chosen = ReplicasConfig(device=engine.device)
    return config.model_copy(update={"engine": chosen})


def _shards_or_copies(config: RunConfig, shards: FsdpConfig, world: int) -> FsdpConfig:
    """Copies for what cannot be cut. Which of the ways that are left is best is for `plan/choose.py` to say."""
    copies = shards.model_copy(update={"replicate": world})
    return shards if is_able(config, shards, world) or not is_able(config, copies, world) else copies


def is_able(config: RunConfig, engine: FsdpConfig, world: int) -> bool:
    """Whether a run can be shared out like this over so many ranks."""
    try:
        FsdpEngine.check_for(config.model_copy(update={"engine": engine}), world)
    except UserError:
        return False
    return True


def build_engine(config: Any, precision: str, needs_fp32_weights: bool = False) -> SingleEngine:
    """The engine that a config section names. precision: fp32, bf16, mixed or auto (`find_precision`)."""
    return ENGINES[config.name](config, precision, needs_fp32_weights)


__all__ = ["ENGINES", "SingleEngine", "build_engine", "is_able", "with_engine"]
