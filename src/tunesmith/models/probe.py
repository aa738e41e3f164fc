"""Questions put to the loaded model itself, so that no list of architectures has to be kept.

1. How do hidden states become logits? (scaled, capped, or by a rule of its own)
2. Can several sequences share a row without seeing each other?
3. Can several continuations of one beginning stand behind it in a row?
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models.head import Head
from tunesmith.models.load import decoder_of

PROBE_TOKENS = 12

WINDOWS: dict[str, frozenset[str]] = {
    "sliding_window": frozenset({"sliding_attention"}),
    "attention_chunk_size": frozenset({"chunked_attention"}),
    "window_size": frozenset(),  # GPT-Neo
    "attention_window_size": frozenset(),  # RecurrentGemma
}
"""Settings by which transformers' configs limit how far back a layer looks, and the `layer_types` that they are for. Without
such types the layers count the columns of a row by themselves, whatever the mask says."""


def find_head(model: Any) -> Head:
    """The rule that gives the model's own logits from its hidden states, found by comparing the two on a few tokens.

    Candidates come from the settings by which transformers' configs name a cap or a scale of logits.
    """
    linear = model.get_output_embeddings()
    if linear is None:  # a value head's model has none
        return Head(None)
    tokens = _tokens(model)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits.float()
        hidden = decoder_of(model)(input_ids=tokens, use_cache=False)[0]
        raw = linear(hidden.to(linear.weight.dtype)).float()
    for head in _candidates(linear, model.config.get_text_config()):
        if torch.allclose(head.transform(raw), expected, rtol=_tolerance(model), atol=_tolerance(model)):
            return head
    return Head(None)


def find_head_by(small: Any, model: Any) -> Head:
    """The same of a model whose weights are not there: its small sibling, in fp32, tells the rule."""
    with torch.autocast("cpu", enabled=False):
        found = find_head(small)
    return found if found.linear is None else replace(found, linear=model.get_output_embeddings())


def _candidates(linear: nn.Module, config: Any) -> list[Head]:
    cap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        scales.append(1.0 / scaling)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        scales.append(scale)
    if multiplier := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        scales.append(multiplier)
    return [Head(linear, scale, cap) for scale in reversed(scales)]


def isolates_sequences(model: Any) -> bool:
    """Whether two sequences packed in one row, told apart by their positions alone, are strangers to each other.

    First: no gradient of the second one's hidden states reaches the first one's embeddings (exact: rounding leaks no
    gradient). Second: the second one's hidden states are those that it has alone, so its positions count from 0.
    State-space and recurrent models fail, and models that ignore `position_ids`; they get one sequence a row.
    """
    tokens = _tokens(model)
    first, second = tokens[: PROBE_TOKENS // 2], tokens[PROBE_TOKENS // 2 :]
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))]).to(tokens.device)
    packed, embedded = _traced(model, {"input_ids": tokens[None], "position_ids": positions[None]})
    return _is_alone(model, packed[len(first) :], embedded, slice(0, len(first)), second)


def shares_prefixes(model: Any) -> bool:
    """Whether two continuations of one beginning can stand behind it in a row, told apart by an attention mask.

    The mask is [1, 1, T, T], 0 or the dtype's lowest number, and positions go on from the beginning in both. As in
    `isolates_sequences`: no gradient from the second continuation to the first, and hidden states as without it.
    Beyond `attention_span` it does not hold: there the mask stands in place of the model's own.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name, layer_kinds in WINDOWS.items() if not layer_kinds):
        return False
    tokens = _tokens(model)
    beginning, first = 5, 4
    end = beginning + first
    numbers = torch.arange(len(tokens), device=tokens.device)
    positions = torch.where(numbers < end, numbers, numbers - first)
    allowed = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=tokens.device).tril()
    allowed[end:, beginning:end] = False
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=tokens.device)
    mask = mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)[None, None]
    inputs = {"input_ids": tokens[None], "position_ids": positions[None], "attention_mask": mask}
    try:
        packed, embedded = _traced(model, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):  # how architectures reject a mask of four dimensions
        return False
    alone = torch.cat([tokens[:beginning], tokens[end:]])
    seen = torch.cat([packed[:beginning], packed[end:]])
    return _is_alone(model, seen, embedded, slice(beginning, end), alone)


def attention_span(model: Any) -> int | None:
    """How many tokens back the nearest-sighted layer looks (sliding window, chunk), itself included; None: all."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    spans = []
    for name, layer_kinds in WINDOWS.items():
        span = getattr(config, name, None)
        if isinstance(span, int) and span > 0 and (not kinds or not layer_kinds or layer_kinds.intersection(kinds)):
            spans.append(span)
    return min(spans, default=None)


def _traced(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] of one row, and the embeddings [1, T, D] that they were made of, with the graph between them."""
    embedded: list[Tensor] = []

    def watch(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            return decoder_of(model)(**inputs, use_cache=False)[0][0], embedded[0]
    finally:
        handle.remove()


def _is_alone(model: Any, seen: Tensor, embedded: Tensor, strangers: slice, tokens: Tensor) -> bool:
    """Whether the hidden states depend on none of the strangers' embeddings, and are those of the tokens alone."""
    (grad,) = torch.autograd.grad(seen.float().square().sum(), embedded)
    with torch.no_grad():
        alone = decoder_of(model)(input_ids=tokens[None], use_cache=False)[0][0]
    error = (seen.detach().float() - alone.float()).abs().max() / alone.float().abs().max()
    return not grad[0, strangers].any() and bool(error < 10 * _tolerance(model))


def _tokens(model: Any) -> Tensor:
    """A few different token ids, the same on every call."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (PROBE_TOKENS,), generator=generator).to(model.device)


def _tolerance(model: Any) -> float:
    return tolerance(model.dtype)


def tolerance(dtype: torch.dtype) -> float:
    """By how much numbers near 1 may differ that were computed in another order."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
