"""What is planned for a rank is what a rank then holds and sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
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
from tunesmith.plan.ranks import held_by, names_of_groups, plan
from tunesmith.plan.shards import RankLedger
from tunesmith.plan.trace import recorded, take_step
from tunesmith.plan.traffic import Count, Traffic

TOKENS, ROWS, BATCH = 16, 2, 8
FEW = 512
"""Bytes of numbers (losses, norms) that ranks tell each other, which are not planned."""

ON_TWO: dict[str, dict[str, Any]] = {
    "full": {},
    "uneven": {"vocabulary": 383},
    "mixed": {"precision": "mixed", "engine": {"activation_checkpointing": True}},
    "kept": {"engine": {"reshard_after_forward": False}, "optimizer": {"name": "lion"}},
    "muon": {"optimizer": {"name": "muon"}},
    "copies": {"engine": {"replicate": 2}, "optimizer": {"name": "sgd", "momentum": 0.9}},
    "lora": {"method": {"name": "lora", "rank": 4}, "precision": "bf16"},
    "freeze": {"method": {"name": "freeze", "last_blocks": 1}},
    "chunk": {"method": {"name": "chunk", "num_chunks": 3, "updates_per_chunk": 2}, "steps": 8},
    "tensor": {"engine": {"tensor_parallel": 2}},
    "tensor, lora": {"engine": {"tensor_parallel": 2}, "method": {"name": "lora", "rank": 4}},
    "tensor, smoothed": {"engine": {"tensor_parallel": 2}, "objective": {"name": "pretrain", "label_smoothing": 0.1}},
    "qwen3_moe": {"family": "qwen3_moe", "precision": "mixed"},
    "checkpointing": {"engine": {"activation_checkpointing": True}},
    "copies, lora": {"engine": {"replicate": 2}, "method": {"name": "lora", "rank": 4}},
    "context": {"engine": {"context_parallel": 2}},
    "context, lora": {"engine": {"context_parallel": 2}, "method": {"name": "lora", "rank": 4}, "precision": "bf16"},
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
    """What this rank holds after a step, has sent and computed in it, and holds at most in two."""
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
    run: Any = SimpleNamespace(learner=learner, objective=build_objective(config.objective), helpers={})
    ledger = RankLedger()
    with recorded(run, ledger):
        with Traffic(names_of_groups(engine)) as traffic:
            take_step(run, batch, ledger)
        flops, held = ledger.flops, held_by(learner.model, method)
        for _ in range((config.train.steps or 2) - 1):  # now with the optimizer's state from the beginning
            take_step(run, batch, ledger)
        held["optimizer state"] = held_by(learner.model, method)["optimizer state"]
    return {"held": held, "counts": traffic.counts, "peaks": ledger.peaks, "flops": flops}


def all_real(configs: dict[str, RunConfig]) -> dict[str, Any]:
    return {name: real(config) for name, config in configs.items()}


@pytest.mark.parametrize(("world", "cases"), [(2, ON_TWO), (4, ON_FOUR)], ids=["2 ranks", "4 ranks"])
def test_a_rank_holds_and_sends_what_was_planned(world: int, cases: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    configs = {name: config_of(case, tmp_path) for name, case in cases.items()}
    ranks = on_ranks(world, all_real, tmp_path, configs)
    errors = {}
    for name, config in configs.items():
        planned, found = plan(config, world), ranks[0][name]
        assert {key: planned.held[key] for key in found["held"]} == found["held"], name
        errors[name] = planned.peak.bytes / max(peak.bytes for peak in found["peaks"].values()) - 1
        assert planned.flops == found["flops"], name
        for key in planned.traffic.keys() | found["counts"].keys():
            ours, theirs = (counts.get(key, Count()).payload for counts in (planned.traffic, found["counts"]))
            assert 0 <= theirs - ours <= (FEW if key[0] == "all-reduce" else 0), (name, key, ours, theirs)
    assert min(errors.values()) > -0.01, errors
    assert max(errors.values()) < 0.04, errors
    assert median(map(abs, errors.values())) < 0.001, errors


def test_data_that_is_there_is_read(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(engine={"name": "fsdp", "device": "cpu"}, train={"batch_size": 8})
    read = plan(config, 2)
    nowhere = config.model_copy(update={"data": config.data.model_copy(update={"path": "nowhere.jsonl"})})
    assumed = plan(nowhere, 2)
    assert (read.is_read, assumed.is_read) == (True, False)
    assert read.tokens < assumed.tokens == config.data.max_tokens
    assert read.peak.bytes < assumed.peak.bytes


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
        ({"method": {"name": "zeroth"}, "optimizer": {"name": "sgd"}}, "zeroth: ranks send each other a few numbers"),
    ],
)
def test_what_cannot_be_planned_is_refused(case: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan(config_of(case, tmp_path), 6)
