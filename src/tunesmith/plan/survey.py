"""What can be done with a model on a device: methods by lengths of samples, without a configuration, data or weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config import RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.engines import with_engine
from tunesmith.errors import UserError
from tunesmith.models.load import load_config, shape_of_model
from tunesmith.plan.devices import Device
from tunesmith.plan.forecast import Forecast, foresee
from tunesmith.plan.rows import full_rows

LENGTHS = (512, 2048, 8192, 32768)
"""Tokens of a sample."""
ROWS = 2
"""Samples of a step, one of which goes through the model at a time: so many more would take as much memory."""

STEPS = 1000
"""So many that each chunk has its turn."""

CHECKPOINTING = {"engine": {"activation_checkpointing": True}}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"method": {"name": "full"}},
    "full, checkpointing": {"method": {"name": "full"}, **CHECKPOINTING},
    "chunk": {"method": {"name": "chunk", "num_chunks": 16}},
    "chunk, checkpointing": {"method": {"name": "chunk", "num_chunks": 16}, **CHECKPOINTING},
    "lora": {"method": {"name": "lora", "rank": 16}},
    "lora, checkpointing": {"method": {"name": "lora", "rank": 16}, **CHECKPOINTING},
    "zeroth": {"method": {"name": "zeroth"}},
}
"""By name the settings of a run."""


@dataclass(frozen=True)
class Cell:
    """One way of training, with samples of one length."""

    way: str
    tokens: int
    forecast: Forecast | None
    """None where it is refused."""
    note: str = ""
    """Why it is."""


def look(model: str, way: str, tokens: int, overrides: Sequence[str], device: Device) -> Cell:
    """Foresee one. overrides: settings over a run's usual ones, such as model.trust_remote_code=true."""
    config = config_of(model, way, tokens, overrides)
    data = full_rows(with_engine(config))
    try:
        with warnings.catch_warnings():  # about numbers, of which there are none
            warnings.simplefilter("ignore")
            return Cell(way, tokens, foresee(config, device, data))
    except UserError as error:
        return Cell(way, tokens, None, str(error).splitlines()[0])


def lengths(model: str, overrides: Sequence[str]) -> list[int]:
    """Those that the model has positions for; its own longest, if all are longer. Raises UserError for a model that cannot be
    built."""
    config = config_of(model, "full", min(LENGTHS), overrides)
    shape_of_model(config.model, torch.bfloat16)
    positions = getattr(load_config(config.model).get_text_config(), "max_position_embeddings", None) or max(LENGTHS)
    return [tokens for tokens in LENGTHS if tokens <= positions] or [positions]


def config_of(model: str, way: str, tokens: int, overrides: Sequence[str]) -> RunConfig:
    """Raises UserError."""
    tree: dict[str, Any] = {
        "model": {"path": model},
        "data": {"path": "synthetic", "max_tokens": tokens, "pack": False},
        "objective": "pretrain",
        "train": {"batch_size": ROWS, "micro_batch_tokens": tokens, "steps": STEPS},
        "output": "nowhere",
        **WAYS[way],
    }
    return config_from_dict(tree, "--", overrides)
