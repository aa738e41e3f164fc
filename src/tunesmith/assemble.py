"""The parts of a run, put together on data that has been read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.config import RunConfig
from tunesmith.data.dataset import Dataset, EvaluationBatches
from tunesmith.data.prepare import Watch
from tunesmith.data.samples import Samples
from tunesmith.data.stream import StreamDataset
from tunesmith.engines import SingleEngine
from tunesmith.engines.context import unable
from tunesmith.errors import UserError
from tunesmith.helpers import build_helpers
from tunesmith.learner import Learner
from tunesmith.methods import METHODS, Extent, build_method
from tunesmith.models.probe import attention_span, isolates_sequences, shares_prefixes
from tunesmith.models.score import has_router
from tunesmith.objectives import Objective, build_objective
from tunesmith.run_data import RunData

if TYPE_CHECKING:
    from tunesmith.plan.forecast import Forecast

WIDEST_MASK = 8192
"""Tokens of the longest row in which prompts are shared: the attention mask has their square, 256 MiB in fp32."""


@dataclass(frozen=True)
class Run:
    """The parts of a run, built from its configuration."""

    config: RunConfig
    """With everything resolved that was auto."""
    tokenizer: Any
    objective: Objective
    samples: Samples
    held_out: Samples
    learner: Learner
    pack: bool
    """Whether sequences share rows: asked for, and the model keeps them apart."""
    share: bool
    """Whether what both of a pair begin with goes through the model once: asked for, and the model allows it."""
    helpers: Mapping[str, Any]
    """What the objective needs beside the model."""
    data: Dataset | StreamDataset
    steps: int
    forecast: Forecast | None = None
    """What it was foreseen to take."""
    measured: dict[str, int] = field(default_factory=dict)
    """Bytes that its largest batch took, at the peak of each phase."""


def assemble(data: RunData, engine: SingleEngine, watch: Watch, build_helpers: Any = build_helpers) -> Run:
    """The parts of a run on data that has been read."""
    config, samples, held_out, tokenizer = data.config, data.samples, data.held_out, data.renderer.tokenizer
    if data.renderer.template_is_ours and not samples.counts.conversations:
        tokenizer.chat_template = None  # the model will not know it

    torch.manual_seed(config.seed)  # the start of what a method inserts
    objective = build_objective(config.objective)
    if not engine.has_whole_rows and any(part.have_media for part in (samples, held_out)):
        raise unable("images, audio and video must be seen with the whole row")
    model, probed = engine.load(
        config.model, model_dtype(engine.precision), objective.head, objective.num_labels,
        METHODS[config.method.name].starts_from_weights(config.method),
    )  # fmt: skip
    _check_fits(config, model, probed, objective, samples, held_out)
    only_scores = "autograd" not in METHODS[config.method.name].requires
    # over rows that are cut, packed attention would need a mask with the square of their length
    usual = only_scores or (engine.device.type != "cpu" and engine.has_whole_rows)
    pack = config.data.pack if config.data.pack is not None else usual
    pack = pack and data.can_pack and isolates_sequences(probed)
    share = (
        config.data.share_prompt
        and objective.form == "pairs"
        and data.can_pack
        and engine.has_whole_rows
        and _may_share(config, probed, pack, samples, held_out)
    )
    assert config.train.micro_batch_tokens is not None, "RunConfig fills it"
    longest = _longest(config, samples, held_out)
    tokens = config.data.max_tokens if pack else min(config.data.max_tokens, longest)
    group = max(part.group_size for part in samples.parts)  # whose rows never part
    rows = max(group, config.train.micro_batch_tokens // tokens)
    accumulates = group * config.train.batch_size > rows
    generate = objective.wanted.generate
    behind = generate.max_new_tokens if generate else 1
    extent = Extent(data.steps, rows, tokens, accumulates, config.seed, longest + behind)
    method = build_method(config, extent)
    learner = Learner(model, engine, method, config.train.micro_batch_tokens)
    config = config.model_copy(update={"method": config.method.model_copy(update=method.resolved())})
    batches = replace(data.batches, pack=pack, share=share)
    size = (config.train.batch_size, config.data.max_tokens, pack, share)
    every = chain.from_iterable(EvaluationBatches(part, *size) for part in (samples, held_out) if len(part))
    fingerprint = samples.fingerprint() + held_out.fingerprint()
    helpers = build_helpers(config, objective, learner, every, fingerprint, watch)
    return Run(config, tokenizer, objective, samples, held_out, learner, pack, share, helpers, batches, data.steps)


def model_dtype(precision: str) -> torch.dtype:
    """Of the weights of the model that trains."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _may_share(config: RunConfig, model: Any, pack: bool, *sets: Samples) -> bool:
    """Whether continuations of one beginning can stand in a row: the model obeys a mask, and sees as far as they are long."""
    span, longest = attention_span(model), _longest(config, *sets)
    widest = 2 * (config.data.max_tokens if pack else longest)
    return (span is None or longest <= span) and widest <= WIDEST_MASK and shares_prefixes(model)


def _longest(config: RunConfig, *sets: Samples) -> int:
    """Tokens of the longest sample; of a stream the most there may be, since later windows may hold longer ones."""
    if config.data.stream:
        return config.data.max_tokens
    return max(int(part.lengths().max()) for part in sets if len(part))


def _check_fits(config: RunConfig, model: Any, probed: Any, objective: Objective, *sets: Samples) -> None:
    """Positions and token ids that the model knows, and experts where they are to be balanced. probed: as `load` gives it.
    Raises UserError."""
    if "router" in objective.reads and any(part.have_media for part in sets):
        raise UserError(
            "objective.router_loss: experts are balanced on text alone, but there are media in the data; set it to 0"
        )
    if "router" in objective.reads and not has_router(probed):
        raise UserError(
            f"objective.router_loss: {type(model).__name__} is no mixture of experts that tells where it sends its tokens; set "
            "it to 0"
        )
    generates = "generated" in objective.reads
    if generates and any(part.have_media for part in sets):
        raise UserError(
            f"objective: {config.objective.name} answers text alone, but there are media in the data; use sft for them"
        )
    more = objective.config.max_new_tokens if generates else 0
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if more and positions and more >= positions:
        raise UserError(
            f"objective.max_new_tokens: {more} are asked for, but the model knows {positions} positions in all; lower it"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    for samples in sets:
        if positions and len(samples) and samples.lengths().max() > positions - more:
            answers = f", and generated answers (objective.max_new_tokens) up to {more} more" if more else ""
            raise UserError(
                f"data.max_tokens: the longest sample has {samples.lengths().max()} tokens{answers}, but the model knows "
                f"{positions} positions; set data.max_tokens to {positions - more} at most"
            )
        if samples.max_token() >= rows:
            raise UserError(
                f"{config.model.path}: the tokenizer gives token id {samples.max_token()}, but the model has {rows} "
                "embeddings: they do not belong together"
            )
