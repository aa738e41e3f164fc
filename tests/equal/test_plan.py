"""What is planned for a rank is what a rank then holds and sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.equal.ranks import on_ranks
from tests.families import FAMILIES, SMALL
from tests.samples import make_samples
from tunesmith.cli import app
from tunesmith.config import RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.data.pack import collate
from tunesmith.engines import build_engine
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.methods import Extent, build_method
from tunesmith.objectives import build_objective
from tunesmith.plan.mesh import held, plan
from tunesmith.plan.traffic import Count, Traffic, group_names

TOKENS, ROWS, BATCH = 16, 2, 8
FEW = 512
"""Bytes of numbers (losses, norms) that ranks tell each other, which are not planned."""
OF_TARGETS = 3 * 4 * BATCH * (TOKENS - 1)
"""The same of numbers for each target, where ranks share out the vocabulary."""

ON_TWO: dict[str, dict[str, Any]] = {
    "full": {},
    "uneven": {"vocabulary": 383},
    "mixed": {"precision": "mixed", "engine": {"activation_checkpointing": True}},
    "kept": {"engine": {"reshard_after_forward": False}, "optimizer": {"name": "lion"}},
    "muon": {"optimizer": {"name": "muon"}},
    "copies": {"engine": {"replicate": 2}, "optimizer": {"name": "sgd", "momentum": 0.9}},
    "lora": {"method": {"name": "lora", "rank": 4}, "precision": "bf16"},
    "freeze": {"method": {"name": "freeze", "last_blocks": 1}},
    "chunk": {"method": {"name": "chunk", "num_chunks": 3}, "steps": 10},
    "tensor": {"engine": {"tensor_parallel": 2}},
    "tensor, lora": {"engine": {"tensor_parallel": 2}, "method": {"name": "lora", "rank": 4}},
    "tensor, smoothed": {"engine": {"tensor_parallel": 2}, "objective": {"name": "pretrain", "label_smoothing": 0.1}},
    "qwen3_moe": {"family": "qwen3_moe", "precision": "mixed"},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "hybrid": {"engine": {"replicate": 2}},
    "tensor and parts": {"engine": {"tensor_parallel": 2, "activation_checkpointing": True}, "family": "qwen3"},
}


def config_of(case: dict[str, Any], folder: Path) -> RunConfig:
    from transformers import CONFIG_MAPPING

    family = case.get("family", "llama")
    settings = {**SMALL, **FAMILIES[family], "vocab_size": case.get("vocabulary", SMALL["vocab_size"])}
    where = folder / f"{family}-{settings['vocab_size']}"
    if not where.exists():
        CONFIG_MAPPING[family](**settings).save_pretrained(where)
    return config_from_dict(
        {
            "model": {"path": str(where), "precision": case.get("precision", "fp32")},
            "data": {"path": "none.jsonl", "max_tokens": TOKENS},
            "objective": case.get("objective", "sft"),
            "method": case.get("method", "full"),
            "optimizer": case.get("optimizer", "adamw"),
            "engine": {"name": "fsdp", "device": "cpu", **case.get("engine", {})},
            "train": {"batch_size": BATCH, "micro_batch_tokens": ROWS * TOKENS, "steps": case.get("steps")},
            "output": str(folder / "run"),
        }
    )


def real(config: RunConfig) -> dict[str, Any]:
    """What this rank holds after a step, and what it has sent in that step."""
    from transformers import AutoConfig, AutoModelForCausalLM

    precision = config.model.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.path), dtype=dtype).eval()
    engine: Any = build_engine(config.engine, precision)
    method = build_method(config, Extent(config.train.steps or 10**6, ROWS, TOKENS, True))
    learner = Learner(model, engine, method, ROWS * TOKENS)
    tokens = [np.arange(TOKENS, dtype=np.int32) + n for n in range(BATCH)]
    weights = [np.r_[0.0, np.ones(TOKENS - 1)].astype(np.float32)] * BATCH
    batch = collate(make_samples(tokens, weights), range(BATCH), max_tokens=TOKENS, pack=False)
    engine.has_checked = True  # once a run
    with Traffic(group_names(engine.mesh, data=engine.data_group)) as traffic:
        learner.step(build_objective(config.objective), batch, lr=1e-3)
    return {"held": held(learner.model, method), "counts": traffic.counts}


def all_real(configs: dict[str, RunConfig]) -> dict[str, Any]:
    return {name: real(config) for name, config in configs.items()}


@pytest.mark.parametrize(("world", "cases"), [(2, ON_TWO), (4, ON_FOUR)], ids=["2 ranks", "4 ranks"])
def test_a_rank_holds_and_sends_what_was_planned(world: int, cases: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    configs = {name: config_of(case, tmp_path) for name, case in cases.items()}
    ranks = on_ranks(world, all_real, tmp_path, configs)
    for name, config in configs.items():
        planned, found = plan(config, world), ranks[0][name]
        assert {key: planned.memory[key] for key in found["held"]} == found["held"], name
        for key in planned.traffic.keys() | found["counts"].keys():
            ours, theirs = (counts.get(key, Count()).payload for counts in (planned.traffic, found["counts"]))
            few = {("all-reduce", "tensor"): FEW + OF_TARGETS}.get(key, FEW if key[0] == "all-reduce" else 0)
            assert 0 <= theirs - ours <= few, (name, key, ours, theirs)


def test_the_command_needs_a_config_alone(tmp_path: Path) -> None:
    config = config_of({}, tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {config.model.path}\ndata: none.jsonl\nmethod: full\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["plan", str(file), "--world", "32", "engine.name=fsdp", "engine.replicate=4"])
    assert result.exit_code == 0, result.output
    for text in ("replicate 4 × shard 8", "all-gather", "node, 450 GB/s", "network, 50 GB/s", "optimizer state"):
        assert text in result.output


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"engine": {"tensor_parallel": 4}}, "engine.tensor_parallel 4 does not divide the 6 ranks"),
        ({"engine": {"context_parallel": 2}}, "engine.context_parallel: what its ranks send"),
        ({"method": {"name": "zeroth"}, "optimizer": {"name": "sgd"}}, "zeroth: ranks send each other a few numbers"),
    ],
)
def test_what_cannot_be_planned_is_refused(case: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan(config_of(case, tmp_path), 6)
