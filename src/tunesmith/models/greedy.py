"""Greedy answers to the prompts of a batch. Shapes: N sequences of the batch, M of them here, T tokens, G new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tunesmith.phases import phase
from tunesmith.types import Batch, Generation


@torch.no_grad()
def greedy_answers(model: Any, batch: Batch, wanted: Generation) -> Tensor:
    """The likeliest next token, again and again, up to an end token: [N, G], as `Scores.generated_NG` says.

    All prompts go through transformers' `generate` at once, in their order and padded at the left. Answers that have ended go
    on as padding until the last one ends, so every pass holds the same rows: those of several states stay state after state.
    """
    prompts = [prompt for prompt, _ in batch.questions()]
    here = [n for n, prompt in enumerate(prompts) if len(prompt)]
    if not here:
        return batch.sample_N.new_full((len(prompts), 0), -1)
    width = max(len(prompts[n]) for n in here)
    tokens_MT = batch.tokens_BT.new_zeros(len(here), width)
    mask_MT = torch.zeros_like(tokens_MT)
    for row, n in enumerate(here):
        start = width - len(prompts[n])
        tokens_MT[row, start:] = prompts[n]
        mask_MT[row, start:] = 1
    ends = list(wanted.end_tokens)
    settings = GenerationConfig(
        max_new_tokens=wanted.max_new_tokens, do_sample=False, use_cache=True, eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip
    with _no_other_settings(model), phase("generation"):
        output_MS = model.generate(input_ids=tokens_MT, attention_mask=mask_MT, generation_config=settings)
    new_MG = output_MS[:, width:]
    has_ended_MG = torch.isin(new_MG, torch.tensor(ends, device=new_MG.device, dtype=new_MG.dtype)).cumsum(1) > 0
    found_NG = new_MG.new_full((len(prompts), new_MG.shape[1]), -1)
    found_NG[here] = new_MG.masked_fill(has_ended_MG, -1)
    return found_NG


@contextmanager
def _no_other_settings(model: Any) -> Iterator[None]:
    """Inside, the checkpoint's own settings are away: transformers fills in a repetition penalty, say, where we say nothing."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
