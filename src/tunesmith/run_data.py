"""The data side of a run, which needs no weights: tokenizer and template, samples, and the batches of every step."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, replace

from tunesmith.config import RunConfig
from tunesmith.data.dataset import Dataset
from tunesmith.data.forms import check_labels
from tunesmith.data.prepare import Watch, load_samples, unwatched
from tunesmith.data.render import Renderer
from tunesmith.data.samples import Samples
from tunesmith.data.stream import StreamDataset, open_stream
from tunesmith.models.load import chatml_for, load_tokenizer
from tunesmith.models.processor import load_processor
from tunesmith.objectives import OBJECTIVES


@dataclass(frozen=True)
class RunData:
    """What a run trains on."""

    config: RunConfig
    """With the day that a chat template shows."""
    renderer: Renderer
    samples: Samples
    """To train on; of a stream those of the first window, held-out ones included."""
    held_out: Samples
    batches: Dataset | StreamDataset
    """One sequence a row; with `replace(batches, pack=True)` several."""
    steps: int

    @property
    def can_pack(self) -> bool:
        """Whether the data allows several sequences in a row; the model has its own word in it."""
        return not self.samples.have_media and not self.held_out.have_media


def open_data(config: RunConfig, watch: Watch = unwatched) -> RunData:
    """Samples and batches of a run. Raises UserError for the first record that cannot be used."""
    config, renderer = build_renderer(config)
    wanted = config.train
    if config.data.stream:
        stream, samples, held_out = open_stream(config, renderer)
        assert wanted.steps, "RunConfig asks for it"
        return RunData(config, renderer, samples, held_out, stream, wanted.steps)
    samples, held_out = load_samples(config.data, renderer, watch)
    check_labels(samples, renderer.form, config.data)
    data = Dataset(samples, config.data, wanted.batch_size, pack=False, seed=config.seed)
    seen = max(1, round(wanted.epochs * data.epoch_samples))
    steps = wanted.steps or math.ceil(seen / wanted.batch_size)
    return RunData(config, renderer, samples, held_out, replace(data, last=None if wanted.steps else seen), steps)


def build_renderer(config: RunConfig) -> tuple[RunConfig, Renderer]:
    """What makes text of examples, for this model and objective; and the configuration with the day that a template shows."""
    tokenizer, processor = load_tokenizer(config.model), load_processor(config.model)
    if processor is not None and processor.chat_template and not config.model.chat_template:
        tokenizer.chat_template = processor.chat_template
    ours = not tokenizer.chat_template
    if ours:
        tokenizer.chat_template = chatml_for(tokenizer)
    if config.data.date is None and "strftime_now" in str(tokenizer.chat_template):
        today = {"date": datetime.date.today()}
        config = config.model_copy(update={"data": config.data.model_copy(update=today)})
    form = OBJECTIVES[config.objective.name].form
    return config, Renderer(tokenizer, config.data, form, ours, processor=processor)
