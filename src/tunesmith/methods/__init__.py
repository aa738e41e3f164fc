"""The table of methods. To add one: a file here, a line in the table, its config class."""

from __future__ import annotations

from tunesmith.config import RunConfig
from tunesmith.methods.base import Method, NonFiniteError
from tunesmith.methods.freeze import Freeze
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora

METHODS: dict[str, type[Method]] = {"full": Full, "freeze": Freeze, "lora": Lora}


def build_method(config: RunConfig) -> Method:
    """The method that a run's configuration names."""
    return METHODS[config.method.name](config.method, config.optimizer, config.train.max_grad_norm)


__all__ = ["METHODS", "Method", "NonFiniteError", "build_method"]
