"""Two questions put to the loaded model itself, so that no list of architectures has to be kept.

1. How do hidden states become logits? (scaled, capped, or by a rule of its own)
2. Can several sequences share a row without seeing each other?
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models.score import Head

PROBE_TOKENS = 12


def find_head(model: Any) -> Head:
    """The rule that gives the model's own logits from its hidden states, found by comparing the two on a few tokens.

    Candidates come from the settings by which transformers' configs name a cap or a scale of logits.
    """
    linear = model.get_output_embeddings()
    if linear is None or not hasattr(model, "get_decoder"):
        return Head(None)
    tokens = _tokens(model)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits.float()
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False)[0]
        raw = linear(hidden.to(linear.weight.dtype)).float()
    for head in _candidates(linear, model.config.get_text_config()):
        if torch.allclose(head.transform(raw), expected, rtol=_tolerance(model), atol=_tolerance(model)):
            return head
    return Head(None)


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
    decoder = model.get_decoder()
    embedded: list[Tensor] = []

    def watch(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            packed = decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False)[0][0, len(first) :]
            (grad,) = torch.autograd.grad(packed.float().square().sum(), embedded[0])
    finally:
        handle.remove()
    with torch.no_grad():
        alone = decoder(input_ids=second[None], use_cache=False)[0][0]
    no_leak = not grad[0, : len(first)].any()
    error = (packed.detach().float() - alone.float()).abs().max() / alone.float().abs().max()
    return no_leak and bool(error < 10 * _tolerance(model))


def _tokens(model: Any) -> Tensor:
    """A few different token ids, the same on every call."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (PROBE_TOKENS,), generator=generator).to(model.device)


def _tolerance(model: Any) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(model.dtype, 2e-2)
