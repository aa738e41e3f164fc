"""Models of known shape with random weights, and batches of sentences that end in one of two words."""

from __future__ import annotations

from typing import Any

import torch
from loops import LozoLoop

from tunesmith.config import SgdConfig, SingleConfig, ZerothConfig
from tunesmith.config_objectives import ClassifyConfig
from tunesmith.engines import SingleEngine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS, Extent
from tunesmith.objectives import build_objective
from tunesmith.types import Batch

WORDS = torch.tensor([100, 200])


def _llama(width: int, inner: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 50272, "dropout": 0.0,
    }  # fmt: skip


SHAPES = {
    "tiny": _llama(64, 160, 4, 2, 1), "10M": _llama(256, 640, 12, 4, 2), "30M": _llama(384, 1024, 18, 6, 2),
    "106M": _llama(576, 1536, 30, 9, 3), "tiny-opt": _opt(64, 2, 2),
    "opt-1.3b": _opt(2048, 24, 32), "opt-2.7b": _opt(2560, 32, 32), "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
}  # fmt: skip
"""10M to 106M: by what the blocks hold; the last has the shape of SmolLM2-135M. OPT's as published (Zhang et al. 2022,
arXiv 2205.01068, table 1)."""


def make_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """The shape with small random weights, made where it will be."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings, max_position_embeddings=2048)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def learner_of(model: Any, device: str, queries: int, rank: int, eps: float) -> Learner:
    """Ours: all states in one pass."""
    is_wide = model.dtype.itemsize >= 4
    engine = SingleEngine(SingleConfig(device=device), "fp32" if is_wide else "bf16")
    config = ZerothConfig(queries=queries, rank=rank, eps=eps)
    return Learner(model, engine, METHODS["zeroth"](config, SgdConfig(lr=1e-6), None, Extent(steps=10**6)), 10**9)


def loop_of(learner: Learner) -> LozoLoop:
    """LOZO's loop on the same layers."""
    method: Any = learner.method
    return LozoLoop(learner.model, method.directions.layers, method.config.eps, method.config.rank, 50, 0)


OBJECTIVE = build_objective(ClassifyConfig())


def step_of_ours(learner: Learner, batch: Batch) -> None:
    float(learner.step(OBJECTIVE, batch, 1e-9)["loss"])


def steps_of_loop(learner: Learner, loop: LozoLoop, batch: Batch, number: int = 1) -> None:
    """The learner is ours, whose model the loop has; its own columns are away meanwhile."""
    method: Any = learner.method
    with method.directions.off():
        for _ in range(number):
            loop.step(batch, 1e-9)


def make_batch(lengths: list[int], pack: bool) -> Batch:
    """Sentences of random tokens, the last of them a word; in one row, or one a row."""
    random = torch.Generator().manual_seed(0)
    width = sum(lengths) if pack else max(lengths)
    rows = 1 if pack else len(lengths)
    tokens_BT = torch.randint(300, 40000, (rows, width), generator=random)
    positions_BT, sequence_BT = torch.zeros(rows, width, dtype=torch.long), torch.full((rows, width), -1)
    weights_BT = torch.zeros(rows, width)
    start = 0
    for n, length in enumerate(lengths):
        row, begin = (0, start) if pack else (n, 0)
        positions_BT[row, begin : begin + length] = torch.arange(length)
        sequence_BT[row, begin : begin + length] = n
        weights_BT[row, begin + length - 1] = 1.0
        tokens_BT[row, begin + length - 1] = WORDS[n % 2]
        start += length
    each = torch.arange(len(lengths))
    batch = Batch(tokens_BT, positions_BT, sequence_BT, weights_BT, each, each)
    return batch.with_columns({"choices": WORDS.expand(rows, width, 2)})


def sentence_lengths(number: int) -> list[int]:
    """Tokens of SST-2's sentences with the prompt: about 10 to 50, 26 on average, from a fixed seed."""
    random = torch.Generator().manual_seed(1)
    return (26 + 11 * torch.randn(number, generator=random)).clamp(8, 60).int().tolist()
