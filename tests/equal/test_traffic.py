"""What ranks send each other in a step, against what sharding and tensor parallelism must send in theory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.batches import ragged_batch
from tests.equal.ranks import on_ranks
from tests.families import SMALL
from tunesmith.config import (
    ChunkConfig,
    FsdpConfig,
    FullConfig,
    LoraConfig,
    ReplicasConfig,
    SftConfig,
    SgdConfig,
    ZerothConfig,
)
from tunesmith.engines import build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS, Extent
from tunesmith.objectives import build_objective
from tunesmith.plan.traffic import Count, Traffic, group_names
from tunesmith.tensors import local_part

WIDE = {**SMALL, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
BLOCKS, SIZE = 2, 4
"""SIZE: bytes of a number."""

ON_TWO: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulated": {"tokens": 24},
    "kept": {"engine": {"reshard_after_forward": False}},
    "copies": {"engine": {"replicate": 2}, "tokens": 24},
    "lora": {"method": LoraConfig(rank=4, alpha=8.0)},
    "chunk": {"method": ChunkConfig(num_chunks=4, order="descending")},
    "tensor": {"engine": {"tensor_parallel": 2}, "tokens": 24},
    "tensor, checkpointing": {"engine": {"tensor_parallel": 2, "activation_checkpointing": True}},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "hybrid": {"engine": {"replicate": 2}, "tokens": 24},
    "tensor and parts": {"engine": {"tensor_parallel": 2}},
}


def wide_model() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**WIDE), dtype=torch.float32).eval()


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """Of the second step (in the first one ranks compare gradients): its traffic; and what there was to send."""
    section = case.get("method", FullConfig())
    engine: Any = build_engine(FsdpConfig(device="cpu", **case.get("engine", {})), "fp32")
    method = METHODS[section.name](section, SgdConfig(lr=0.1), 1.0, Extent(steps=100))
    learner = Learner(wide_model(), engine, method, case.get("tokens", 10**6))
    objective, batch = build_objective(SftConfig()), ragged_batch(False)
    learner.step(objective, batch, lr=0.1)
    with Traffic(group_names(engine.mesh, data=engine.data_group)) as traffic:
        learner.step(objective, batch, lr=0.1)
    pieces = method.micro_batches(batch, learner.micro_batch_tokens)
    inside = [local_part(p).numel() if ".layers." in name else 0 for name, p in learner.model.named_parameters()]
    return {
        "counts": traffic.counts,
        "pieces": len(pieces),
        "tokens": sum(piece.tokens_BT.numel() for piece in pieces),
        "targets": sum(int((piece.weights_BT != 0).sum()) for piece in pieces),
        "blocks": sum(inside),
        "all": sum(local_part(p).numel() for p in learner.model.parameters()),
        "active": sum(local_part(p).numel() for p in method.active().values()),
    }


def measure_all(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: measured(case) for name, case in cases.items()}


def payload(found: dict[str, Any], kind: str, group: str) -> float:
    return found["counts"].get((kind, group), Count()).payload


def check(found: dict[str, Any], expected: dict[tuple[str, str], float]) -> None:
    """That payloads are these, within 5 %, and nothing else is sent but numbers."""
    total = sum(expected.values())
    for key in found["counts"].keys() | expected.keys():
        assert payload(found, *key) == pytest.approx(expected.get(key, 0), rel=0.05, abs=0.005 * total), key


def of_sharding(
    found: dict[str, Any], shard: int, resharded: bool = True, trained: str = "all"
) -> dict[tuple[str, str], float]:
    """Each micro-batch gathers the blocks' weights for the forward and, if they were let go of, for the backward pass; the
    others (embeddings, last norm, head), which stay, once. Gradients of what trains are summed once each."""
    k, blocks, rest = found["pieces"], found["blocks"] * shard, (found["all"] - found["blocks"]) * shard
    return {
        ("all-gather", "shard"): k * ((2 if resharded else 1) * blocks + rest) * SIZE,
        ("reduce-scatter", "shard"): k * found[trained] * shard * SIZE,
    }


def of_tensors(found: dict[str, Any], sums: int = 4) -> dict[tuple[str, str], float]:
    """Two sums of [tokens, hidden] a block in the forward pass, and two in the backward pass. For the loss the gradient of
    targets' hidden states, and three numbers of each."""
    numbers = BLOCKS * sums * found["tokens"] * WIDE["hidden_size"] + found["targets"] * (WIDE["hidden_size"] + 3)
    return {("all-reduce", "tensor"): numbers * SIZE}


def test_two_ranks_send_what_they_must(tmp_path: Path) -> None:
    for rank in on_ranks(2, measure_all, tmp_path, ON_TWO):
        assert rank["accumulated"]["pieces"] > 1
        check(rank["full"], of_sharding(rank["full"], 2))
        check(rank["accumulated"], of_sharding(rank["accumulated"], 2))
        check(rank["kept"], of_sharding(rank["kept"], 2, resharded=False))
        check(rank["copies"], {("all-reduce", "replicate"): rank["copies"]["all"] * SIZE})
        check(rank["lora"], of_sharding(rank["lora"], 2, trained="active"))
        check(rank["tensor"], of_tensors(rank["tensor"]))
        # of a block that is computed again the last sum is left out: nothing behind it was to be kept
        check(rank["tensor, checkpointing"], of_tensors(rank["tensor, checkpointing"], sums=5))
        sent = rank["full"]["counts"][("all-gather", "shard")]
        assert sent.sent == sent.payload / 2
        chunk = rank["chunk"]
        assert chunk["active"] < chunk["all"] / 2
        assert payload(chunk, "reduce-scatter", "shard") == chunk["active"] * 2 * SIZE


def test_four_ranks_send_what_they_must(tmp_path: Path) -> None:
    for rank in on_ranks(4, measure_all, tmp_path, ON_FOUR):
        hybrid, both = rank["hybrid"], rank["tensor and parts"]
        summed = {("all-reduce", "replicate"): hybrid["pieces"] * hybrid["all"] * SIZE}
        check(hybrid, of_sharding(hybrid, 2) | summed)
        check(both, of_sharding(both, 2) | of_tensors(both))


# --- method zeroth


class Counted:
    """A store that counts the bytes of what goes in and comes out."""

    def __init__(self, store: Any) -> None:
        self.store, self.bytes = store, 0

    def set(self, key: str, value: str) -> None:
        self.bytes += len(value)
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self.store.get(key)
        self.bytes += len(value)
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def zeroth_step() -> tuple[dict[Any, Count], int]:
    engine: Any = build_engine(ReplicasConfig(device="cpu", check_every=0), "fp32")
    method = METHODS["zeroth"](ZerothConfig(queries=2), SgdConfig(lr=1e-3), None, Extent(steps=2))
    learner = Learner(wide_model(), engine, method, 10**6)
    with engine.group.joined({}):
        engine.group.store = counted = Counted(engine.group.store)
        with Traffic({}) as traffic:
            learner.step(build_objective(SftConfig()), ragged_batch(False), lr=1e-3)
        found = counted.bytes
        engine.group.store = counted.store
    return traffic.counts, found


def test_ranks_that_score_send_a_few_numbers(tmp_path: Path) -> None:
    for counts, sent in on_ranks(2, zeroth_step, tmp_path):
        assert counts == {}
        assert 0 < sent < 2000
