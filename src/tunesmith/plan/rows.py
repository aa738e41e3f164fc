"""Data that is not there: a run's samples as they may be at worst, each as long as data.max_tokens allows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tunesmith.config import RunConfig, SetConfig
from tunesmith.data.dataset import Dataset
from tunesmith.data.samples import Counts, Part, whole
from tunesmith.models.load import load_config
from tunesmith.objectives import OBJECTIVES
from tunesmith.run_data import RunData

MANY = 10**6
"""Steps of a run that does not say how many."""


def full_rows(config: RunConfig) -> RunData:
    """A batch of samples without any text, all of whose tokens but the first are targets."""
    samples = whole([_part(config)], [SetConfig(path="full rows")])
    batches = Dataset(samples, config.data, config.train.batch_size, pack=False, seed=config.seed)
    nothing: Any = SimpleNamespace(tokenizer=None, template_is_ours=False)
    return RunData(
        config, nothing, samples, samples.select([np.zeros(len(samples), bool)]), batches, config.train.steps or MANY
    )


def _part(config: RunConfig) -> Part:
    kind = OBJECTIVES[config.objective.name]
    number, width, group = config.train.batch_size, _width(config), 2 if kind.form == "pairs" else 1
    rows = number * group
    weights = np.ones((rows, width), np.float32)
    weights[:, 0] = 0
    is_of_choices = kind.form == "choices"
    return Part(
        name="full rows",
        tokens=np.zeros(rows * width, np.int32),
        weights=weights.ravel(),
        offsets=np.arange(rows + 1) * width,
        content=np.arange(number, dtype=np.uint64),
        file=np.zeros(number, np.int32),
        line=np.arange(number),
        label=(np.arange(number) % 2).astype(np.float32),
        files=("",),
        group_size=group,
        fingerprint="",
        max_token=0,
        counts=Counts(records=number),
        choices=np.zeros(2 * number, np.int32) if is_of_choices else None,
        choices_at=2 * np.arange(number + 1) if is_of_choices else None,
    )


def _width(config: RunConfig) -> int:
    """Tokens of a sample: no more than the model has positions for."""
    positions = getattr(load_config(config.model).get_text_config(), "max_position_embeddings", None)
    return min(config.data.max_tokens, positions or config.data.max_tokens)
