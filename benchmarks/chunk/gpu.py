"""Full fine-tuning of 7B to 32B shapes on one GPU, with random weights: peak of the allocator and seconds of a step.

    python benchmarks/chunk/gpu.py [--cases llama2-7b llama3-8b qwen-32b] [--steps 12]
    python benchmarks/chunk/gpu.py --foresee    # no GPU: one block of each shape is measured on the CPU, the rest is arithmetic

- llama2-7b, 1 × 1024 tokens, bf16: chunk in 13.2 GiB, and full fine-tuning with activation checkpointing (bf16 throughout).
- llama3-8b, the same within 16 GiB, and full fine-tuning with checkpointing.
- qwen-32b (Qwen2.5-32B's shape) with streamed weights, within 24 GiB; the host holds the weights, 61 GiB.
`foreseen` is what the method said before the first step. Chunks change every second step, so that switches are in the figures.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import median
from sides import foreseen

from tunesmith.config import AdamWConfig, ChunkConfig, FullConfig, SftConfig, SingleConfig
from tunesmith.engines import SingleEngine, build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS, Extent
from tunesmith.methods.budget import Budget
from tunesmith.methods.stream import WINDOW
from tunesmith.objectives import build_objective
from tunesmith.plan.activations import Activations
from tunesmith.types import Batch

SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32000},
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256},
    "qwen-32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
                 "num_key_value_heads": 8, "vocab_size": 152064},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
}  # fmt: skip
CHUNK: dict[str, dict[str, Any]] = {
    "llama2-7b": {"memory": "13.2GiB"},
    "llama3-8b": {"memory": "16GiB"},
    "qwen-32b": {"chunk_bytes": "1GiB", "weights": "stream"},
    "tiny": {"num_chunks": 6, "weights": "stream"},
}


def make_model(shape: str, device: str, **settings: Any) -> Any:
    """The shape with small random weights in bf16. Each matrix is filled on the device where the model will be."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **{**SHAPES[shape], **settings}, max_position_embeddings=4096, tie_word_embeddings=False, rope_theta=500000.0
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = model.to_empty(device=device)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.uniform_(-0.02, 0.02)
        width = config.hidden_size // config.num_attention_heads
        frequencies = 500000.0 ** (-torch.arange(0, width, 2, dtype=torch.float, device=device) / width)
        model.model.rotary_emb.inv_freq = frequencies  # buffers come empty from meta too
    return model.eval()


def make_batch(tokens: int, vocabulary: int, step: int) -> Batch:
    """One row of random tokens, all of them targets."""
    ids = torch.randint(3, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(step))
    weights = torch.ones(1, tokens)
    weights[0, 0] = 0.0
    zero = torch.zeros(1, dtype=torch.long)
    return Batch(ids, torch.arange(tokens)[None], torch.zeros_like(ids), weights, sample_N=zero, group_N=zero)


def expected(learner: Learner, tokens: int) -> float:
    """Bytes at the peak: weights on the device, what the method declares, activations."""
    method: Any = learner.method
    if getattr(method, "fit", None):
        return method.fit.peak_bytes
    weights = sum(p.numel() * p.element_size() for p in learner.model.parameters())
    if getattr(method, "stream", None):
        blocks = learner.model.model.layers
        block = sum(p.numel() * p.element_size() for p in blocks[0].parameters())
        weights -= (len(blocks) - WINDOW - len(method.stream.held)) * block
    return weights + foreseen(learner, 1, tokens)[1]


def measure(shape: str, method: str, args: argparse.Namespace) -> None:
    section: Any = FullConfig()
    if method == "chunk":
        section = ChunkConfig(**CHUNK[shape], updates_per_chunk=2)
    on_host = getattr(section, "weights", "") == "stream"
    engine = build_engine(
        SingleConfig(device=args.device, activation_checkpointing=method == "full" or on_host), "bf16"
    )
    model = make_model(shape, "cpu" if on_host else args.device)
    extent = Extent(steps=10**6, rows=1, tokens=args.tokens)
    learner = Learner(model, engine, METHODS[section.name](section, AdamWConfig(lr=1e-6), 1.0, extent), args.tokens)
    peak = expected(learner, args.tokens)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    objective, seconds = build_objective(SftConfig()), []
    for step in range(args.steps):
        batch = make_batch(args.tokens, SHAPES[shape]["vocab_size"], step)
        start = perf_counter()
        float(learner.step(objective, batch, 1e-6)["loss"])
        seconds.append(perf_counter() - start)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(
        f"{shape:10} {method:6} weights {weights / 2**30:6.2f} GiB · peak {engine.memory_bytes() / 2**30:6.2f} GiB, "
        f"{peak / 2**30:.2f} foreseen · "
        f"{median(seconds[2:]):.3f} s/step · {learner.method.describe()}",
        flush=True,
    )


class _Foreseen(SingleEngine):
    """Says what the whole model would take, from one of its blocks."""

    def __init__(self, shape: str) -> None:
        super().__init__(SingleConfig(device="cpu"), "bf16")
        self.shape = shape

    def economize(self) -> None:
        pass

    def held_bytes(self) -> int:
        return sum(2 * p.numel() for p in self.whole.parameters())

    def activations(self, model: Any, rows: int, tokens: int) -> Activations:
        one = make_model(self.shape, "cpu", num_hidden_layers=1).requires_grad_(False)
        self.place(one)
        found = super().activations(one, rows, tokens)
        return Activations(found.blocks * SHAPES[self.shape]["num_hidden_layers"], found.head)


def foresee(shape: str, tokens: int) -> None:
    """Chunks and peak that a budget gives, without the model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    engine = _Foreseen(shape)
    with torch.device("meta"):
        engine.whole = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape], tie_word_embeddings=False))
    engine.whole.to(torch.bfloat16)
    section = ChunkConfig(memory=CHUNK[shape]["memory"])
    extent = Extent(steps=10**6, rows=1, tokens=tokens)
    method: Any = METHODS["chunk"](section, AdamWConfig(lr=1e-6), 1.0, extent)
    method.model = engine.whole
    pieces = {name: method._piece(name, p) for name, p in engine.whole.named_parameters()}
    fit = Budget(section.memory, engine.whole, engine, extent, pieces, ()).fit(list(pieces.values()), None)
    print(
        f"{shape:10} weights {engine.held_bytes() / 2**30:.2f} GiB, budget {section.memory / 2**30:.2f} GiB · "
        f"{len(fit.chunks)} chunks, {sum(fit.checkpointing)} of them checkpointed · {fit.peak_bytes / 2**30:.2f} GiB foreseen",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", choices=list(SHAPES), default=["llama2-7b", "llama3-8b", "qwen-32b"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--foresee", action="store_true")
    args = parser.parse_args()
    if args.foresee:
        for shape in args.cases:
            if "memory" in CHUNK[shape]:
                foresee(shape, args.tokens)
        return
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"{name} · torch {torch.__version__}")
    for shape in args.cases:
        for method in ("chunk",) if shape == "qwen-32b" else ("full", "chunk"):
            try:
                measure(shape, method, args)
            except torch.OutOfMemoryError as error:
                print(f"{shape:10} {method:6} out of memory: {str(error).splitlines()[0]}", flush=True)
            gc.collect()
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
