"""Tokens a second and model FLOPs utilisation of a step on one GPU: random weights of Llama-3-8B's shape, rows packed to 4096.

    python benchmarks/engines/gpu.py [--method lora full] [--rows 4] [--steps 8] [--no-compile] [--tiny]

The utilisation is that of the rate at which this GPU multiplies bf16 matrices, measured here, not of its data sheet. FLOPs are
those of the model: what checkpointing computes again is not counted, nor gradients of frozen weights. --tiny: a small model, to
see that the script runs where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import median, perf_counter, print_machine, synchronize

from tunesmith.config import AdamWConfig, FullConfig, LoraConfig, PretrainConfig, SingleConfig
from tunesmith.engines import build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS
from tunesmith.objectives import build_objective
from tunesmith.types import Batch

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = {
    **LLAMA_3_8B, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
TOKENS, SEQUENCES = 4096, 4
"""Of a row, and how many sequences share it."""


def make_model(shape: dict[str, int], device: torch.device) -> Any:
    import transformers

    with device:
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape), dtype=torch.bfloat16)


def packed(rows: int, tokens: int, vocabulary: int) -> Batch:
    """Rows of some sequences each, all tokens but the first of a sequence targets."""
    length = tokens // SEQUENCES
    number = torch.arange(rows * SEQUENCES)
    weights = torch.ones(rows, tokens)
    weights[:, ::length] = 0
    return Batch(
        torch.randint(0, vocabulary, (rows, tokens)),
        torch.arange(length).repeat(SEQUENCES).expand(rows, -1).contiguous(),
        number.repeat_interleave(length).view(rows, tokens),
        weights, number, number,
    )  # fmt: skip


def step_flops(model: Any, method: str, rows: int, tokens: int) -> float:
    """6 a weight and token (4 where weights are frozen), and attention within each sequence: 12 × width × its causal half."""
    config = model.config
    weights = sum(
        p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "lora" not in name
    )
    attention = 12 * config.num_hidden_layers * config.hidden_size * (tokens // SEQUENCES) / 2
    return rows * tokens * ((6 if method == "full" else 4) * weights + attention)


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of bf16 matrix products."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(10):
        synchronize()
        start = perf_counter()
        a @ a
        synchronize()
        seconds.append(perf_counter() - start)
    return 2 * size**3 / median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--rows", type=int, default=4, help="Of 4096 tokens, in one micro-batch.")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    shape, tokens = (TINY, 64) if args.tiny else (LLAMA_3_8B, TOKENS)
    print_machine()
    rate = matrix_rate(device, 256 if args.tiny else 8192)
    print(f"{device} · bf16 matrices {rate / 1e12:.1f} TFLOP/s")
    for name in args.method:
        section = FullConfig() if name == "full" else LoraConfig(rank=16, alpha=32.0)
        method = METHODS[name](section, AdamWConfig(lr=1e-5), max_grad_norm=1.0)
        model = make_model(shape, device)
        settings = SingleConfig(activation_checkpointing=True, compile=not args.no_compile)
        learner = Learner(model, build_engine(settings, "bf16"), method, args.rows * tokens)
        objective, batch = build_objective(PretrainConfig()), packed(args.rows, tokens, shape["vocab_size"])
        seconds = []
        for _ in range(args.steps + 2):
            synchronize()
            start = perf_counter()
            learner.step(objective, batch, 1e-5)
            synchronize()
            seconds.append(perf_counter() - start)
        taken = median(seconds[2:])
        used = step_flops(learner.model, name, args.rows, tokens) / taken / rate
        print(
            f"{name:5} {args.rows} × {tokens} tokens: {args.rows * tokens / taken:9.1f} tokens/s · {used:.1%} of the matrix "
            f"rate · {learner.engine.memory_bytes() / 2**30:.1f} GiB",
            flush=True,
        )
        del learner, method, model


if __name__ == "__main__":
    main()
