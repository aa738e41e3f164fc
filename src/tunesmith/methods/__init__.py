"""The table of methods. To add one: a file here, a line in the table, its config class."""

from __future__ import annotations

from tunesmith.config import RunConfig
from tunesmith.methods.base import Extent, Method, NonFiniteError
from tunesmith.methods.chunk import Chunk
from tunesmith.methods.freeze import Freeze
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora
from tunesmith.methods.zeroth import Zeroth

METHODS: dict[str, type[Method]] = {"full": Full, "freeze": Freeze, "lora": Lora, "chunk": Chunk, "zeroth": Zeroth}


def build_method(config: RunConfig, extent: Extent | None = None) -> Method:
    """The method that a run's configuration names, for a run of this extent."""
    return METHODS[config.method.name](config.method, config.optimizer, config.train.max_grad_norm, extent or Extent())


__all__ = ["METHODS", "Extent", "Method", "NonFiniteError", "build_method"]
