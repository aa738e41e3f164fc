"""Data of a run that has none: samples of a given length, to see what a model would take."""

from __future__ import annotations

from typing import Any

import numpy as np

from tunesmith.config import RunConfig
from tunesmith.data.dataset import Dataset
from tunesmith.data.render import Renderer
from tunesmith.data.samples import Counts, Part, Samples, whole
from tunesmith.run_data import RunData

TOKEN = 1
"""Of which all samples are made: every vocabulary has it."""


def synthetic_data(config: RunConfig, tokens: int, number: int) -> RunData:
    """So many samples of so many tokens, all of which are to be learnt. No tokenizer is asked."""
    samples, none = _samples(tokens, number, config), _samples(tokens, 0, config)
    batches = Dataset(samples, config.data, config.train.batch_size, pack=False, seed=config.seed)
    assert config.train.steps, "how long an epoch of nothing is, nobody knows"
    nobody: Any = None  # there is no text
    return RunData(config, Renderer(nobody, config.data), samples, none, batches, config.train.steps)


def _samples(tokens: int, number: int, config: RunConfig) -> Samples:
    part = Part(
        name="synthetic",
        tokens=np.full(tokens * number, TOKEN, np.int32),
        weights=np.ones(tokens * number, np.float32),
        offsets=np.arange(number + 1, dtype=np.int64) * tokens,
        content=np.arange(number, dtype=np.uint64),
        file=np.zeros(number, np.int32),
        line=np.arange(number),
        label=np.zeros(number, np.float32),
        files=("synthetic",),
        group_size=1,
        fingerprint=f"{number} samples of {tokens} tokens",
        max_token=TOKEN,
        counts=Counts(records=number),
    )
    return whole([part], config.data.all_sets())
