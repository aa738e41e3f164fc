"""A small model of the same build, with random weights, to put questions to that do not depend on the weights.

It stands in for a model whose weights are spread over many processes, or not there yet: `find_head`,
`isolates_sequences` and `shares_prefixes` say of it what they say of the model.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from tunesmith.models.load import blocks, decoder_of

VOCABULARY = 512
"""Rows of the sibling's embeddings, at most."""
INNER = 64
"""Width of its feed-forward layers, at most."""
PER_HEAD = 8
"""Its hidden size per attention head, at most, where heads have a size of their own."""
RECURRENT = ("mamba", "ssm", "expand", "lru", "rwkv")
"""In the names of settings that tie other widths to the hidden size."""
BY_LAYER = ("layer", "block", "pattern", "types", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""In the names of settings that have an entry for each block."""
NOISE = 0.02
"""Added to all weights: some architectures start layers at 0, which then could not be seen to do anything."""


def sibling(model: Any) -> Any:
    """The same class in fp32 on the CPU, with as few blocks as have all kinds of blocks, and narrow where it may be.

    model: one of transformers, without adapters and not yet sharded; its weights are not looked at. Parts beside the
    language model and its head (towers) get no weights: it reads text alone. torch's random state is kept.
    """
    kinds = [_kind(block) for _, block in blocks(model)]
    fewest = next(n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds))
    for count in dict.fromkeys((fewest, len(kinds))):
        other = _empty(type(model), _small(model.config, count))
        if {_kind(block) for _, block in blocks(other)} == set(kinds):  # patterns may count from the end
            break
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _start(other)
    return other.eval()


def _kind(block: nn.Module) -> frozenset[tuple[str, Any]]:
    """What a block is made of, and its switches: whatever may differ from block to block but for sizes and numbers."""
    found: set[tuple[str, Any]] = set()
    for name, module in block.named_modules():
        found.add((name, type(module).__name__))
        switches = {key: value for key, value in vars(module).items() if value is None or type(value) in (bool, str)}
        found |= {(f"{name}.{key}", value) for key, value in switches.items() if key[0] != "_" and key != "training"}
    return frozenset(found)


def _small(architecture: Any, layers: int) -> Any:
    """The settings with so many blocks, and smaller widths where those are free."""
    small = deepcopy(architecture)
    text = small.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        by_layer = any(word in name for word in BY_LAYER) and isinstance(value, list | tuple | str)
        if by_layer and len(value) == before > layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    for config in (small, text):
        _shrink_vocabulary(config)
    heads, head_dim = vars(text).get("num_attention_heads"), vars(text).get("head_dim")
    for name, value in list(vars(text).items()):
        if heads and ("intermediate_size" in name or name == "ffn_dim"):  # without heads a state space's width
            setattr(text, name, _at_most(value, INNER))
    is_recurrent = any(word in name for name in vars(text) for word in RECURRENT)
    if isinstance(heads, int) and isinstance(head_dim, int) and not is_recurrent:
        text.hidden_size = min(text.hidden_size, PER_HEAD * heads)
    return small


def _shrink_vocabulary(config: Any) -> None:
    for name in [name for name in vars(config) if name.startswith("vocab_size")]:
        setattr(config, name, _at_most(getattr(config, name), VOCABULARY))
    if not isinstance(getattr(config, "vocab_size", None), int):
        return
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and token >= config.vocab_size:
            setattr(config, name, config.vocab_size - 1)


def _at_most(value: Any, most: int) -> Any:
    if isinstance(value, list | tuple):
        return [_at_most(each, most) for each in value]
    return min(value, most) if isinstance(value, int) else value


def _empty(kind: Any, architecture: Any) -> Any:
    with torch.device("meta"):
        return kind._from_config(architecture, dtype=torch.float32)


@torch.no_grad()
def _start(model: Any) -> None:
    """Random weights for all but the towers."""
    from transformers import PreTrainedModel

    decoder = decoder_of(model)
    inside = set(decoder.modules())
    towers = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module not in inside and decoder not in set(module.modules())
    ]
    left_out = {part for tower in towers for part in tower.modules()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        module._is_hf_initialized = False
        if module in left_out:
            continue
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.zeros_like(p, device="cpu"))
                module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    model.initialize_weights()
    for p in made.values():
        p.add_(torch.randn(p.shape, dtype=p.dtype), alpha=NOISE)
    for part in left_out:  # on the CPU they take no memory either, and the model says that it is there
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    hollow = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    tensors[name] = nn.Parameter(hollow) if name in part._parameters else hollow
