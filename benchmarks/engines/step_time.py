"""A training step of engine fsdp against a hand-written FSDP2 loop on the same ranks: same model, rows, optimizer and clipping.

    torchrun --nproc-per-node 2 benchmarks/engines/step_time.py [--rounds 15] [--blocks 8] [--width 512]

What engine single costs over a bare loop is measured by benchmarks/loop_overhead/run.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from common import in_turn, median, print_machine, ratio
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tunesmith.config import AdamWConfig, FsdpConfig, FullConfig, PretrainConfig
from tunesmith.engines import build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS
from tunesmith.objectives import build_objective
from tunesmith.types import Batch

ROWS, LENGTH, VOCABULARY, LR = 8, 256, 4096, 1e-5


def make_model(blocks: int, width: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=VOCABULARY,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def rows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def ours(model: Any) -> Callable[[], None]:
    method = METHODS["full"](FullConfig(), AdamWConfig(lr=LR, weight_decay=0.0), max_grad_norm=1.0)
    learner = Learner(model, build_engine(FsdpConfig(device="cpu"), "fp32"), method, ROWS * LENGTH)
    objective = build_objective(PretrainConfig())
    weights = torch.ones(ROWS, LENGTH)
    weights[:, 0] = 0
    number = torch.arange(ROWS)
    batch = Batch(
        rows(), torch.arange(LENGTH).expand(ROWS, -1), number[:, None].expand(-1, LENGTH), weights, number, number
    )

    def step() -> None:
        learner.step(objective, batch, LR)

    return step


def by_hand(model: Any) -> Callable[[], None]:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    ids = rows()[rank * ROWS // world : (rank + 1) * ROWS // world]
    model.train()

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    mine = ours(make_model(args.blocks, args.width))  # joins the ranks
    seconds = in_turn({"tunesmith": mine, "by hand": by_hand(make_model(args.blocks, args.width))}, args.rounds)
    if dist.get_rank() == 0:
        print_machine()
        print(
            f"{ROWS} × {LENGTH} tokens a step on {dist.get_world_size()} ranks, median of {args.rounds} rounds in turn"
        )
        for name, times in seconds.items():
            over = ratio(seconds["tunesmith"], times)
            print(f"  {name:10} {median(times):7.3f} s a step   ours over this: {over:.3f}")


if __name__ == "__main__":
    main()
