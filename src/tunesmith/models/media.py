"""A forward pass with images, audio and video: what a batch holds of them as arguments of the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.models.processor import TOKEN_TYPES
from tunesmith.types import Batch


def media_inputs(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the sequences that have rows here, in the order of the rows; pixels and sounds in the model's dtype."""
    order = batch.sequence_BT[:, 0].tolist()
    present = [dict(batch.media_N[n]) for n in order]
    columns: dict[str, Tensor] = {}
    for name in TOKEN_TYPES:
        if any(name in media for media in present):
            columns[name] = torch.zeros_like(batch.tokens_BT)
            for row, media in enumerate(present):
                if name in media:
                    types_T = media.pop(name)
                    width = min(len(types_T), columns[name].shape[1])  # a row may have been cut
                    columns[name][row, :width] = types_T[:width]
    names = dict.fromkeys(name for media in present for name in media)
    says_sizes = any("mask" in name or "size" in name for name in names)
    joined = {name: _join([media[name] for media in present if name in media], says_sizes) for name in names}
    # numbers in one dimension are seconds or sizes, of which bf16 would lose digits
    as_model = {n: x.to(dtype) if x.is_floating_point() and x.ndim > 1 else x for n, x in joined.items()}
    return columns | as_model


def _join(tensors: Sequence[Tensor], says_sizes: bool) -> Tensor:
    """End to end; zeros fill up where one is smaller in another dimension, as a processor does with a batch.

    Only where a mask or the sizes go to the model too: else it would take the zeros for a part of the picture.
    """
    inner = [max(sizes) for sizes in zip(*(x.shape[1:] for x in tensors), strict=True)]
    padded = []
    for x in tensors:
        missing = [size for most, here in zip(inner, x.shape[1:], strict=True) for size in (most - here, 0)]
        if any(missing) and not says_sizes:
            raise UserError(
                "train.micro_batch_tokens: media of unequal sizes cannot go through this model together; set it to 1, and "
                "each sequence goes alone"
            )
        padded.append(nn.functional.pad(x, missing[::-1]) if any(missing) else x)
    return torch.cat(padded)


def hidden_before_head(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The hidden states that the model's own forward gives to its head, [B, T, D].

    Only the whole model knows how its towers and its language model go together; its head then sees one column alone, so
    that no [tokens, vocabulary] tensor is made.
    """
    seen: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(arguments[0])
        return (arguments[0][:, :1], *arguments[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[0]
