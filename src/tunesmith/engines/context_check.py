"""Whether a model's rows can be cut over ranks: by what its class and settings say, and by what it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.engines.context import ContextParallel, Cut, unable
from tunesmith.errors import UserError
from tunesmith.models.head import Head
from tunesmith.models.probe import tolerance
from tunesmith.models.score import compute_dtype, hidden_of_targets
from tunesmith.types import Batch

LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers, by transformers' names, that mix tokens by attention under a causal mask alone."""

ROPES_OF_LENGTH = ("dynamic", "longrope")
"""Position embeddings that depend on the longest position in sight, which ranks would see differently."""


def check_architecture(architecture: Any, attention: str = "auto") -> None:
    """Raises UserError for what is known to need whole rows, from transformers' config of a model alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = architecture.get_text_config()
    if attention not in ("auto", "sdpa"):
        raise unable(f"attention over ranks comes from torch's SDPA, and model.attention is {attention}")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)  # unknown for code of the checkpoint's own
    if kind is not None and (kind._is_stateful or not (kind._supports_attention_backend and kind._supports_sdpa)):
        raise unable(f"{kind.__name__} has layers that are no plain attention, and need whole rows")
    if others := set(getattr(text, "layer_types", None) or ()) - LAYERS:
        raise unable(f"{text.model_type} has layers of {', '.join(sorted(others))}, which need whole rows")
    if ropes := [name for name in _ropes(text) if name in ROPES_OF_LENGTH]:
        raise unable(f"the positions of {text.model_type} ({ropes[0]}) depend on how long rows are")


def _ropes(text: Any) -> list[str]:
    """Kinds of the rotary position embeddings in use; of each kind of layers where they have their own."""
    found = getattr(text, "rope_parameters", None) or {}
    every = [each for each in found.values() if isinstance(each, dict)] or [found]
    return [each.get("rope_type", "default") for each in every]


def check_cut(model: Any, head: Head, context: ContextParallel) -> None:
    """Compare hidden states of rows in pieces with those of whole rows. All ranks run this; raises UserError."""
    batch = _two_rows(model, 6 * context.world).to(context.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        whole_ND = hidden_of_targets(model, head, batch).float()
        try:
            cut_ND = hidden_of_targets(model, head, batch, Cut(context, batch)).float()
        except UserError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:  # as in `shares_prefixes`
            raise unable(f"{model.config.model_type} reads rows in one piece alone ({type(error).__name__})") from error
    model.train(was_training)
    if _error(cut_ND, whole_ND) > 10 * tolerance(compute_dtype(model)):
        raise unable(f"{model.config.model_type} makes other hidden states of rows in pieces than of whole ones")


def _error(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).abs().max() / expected.abs().max())


def _two_rows(model: Any, width: int) -> Batch:
    """Two sequences of different lengths, one a row; all tokens but their first are targets."""
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens_BT = torch.randint(0, vocabulary, (2, width), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(2)
    here = torch.arange(width) < torch.tensor([[width], [width // 2]])
    position_BT = torch.arange(width) * here
    sequence_BT = numbers[:, None].where(here, -1)
    return Batch(tokens_BT, position_BT, sequence_BT, (position_BT > 0).float(), sample_N=numbers, group_N=numbers)
