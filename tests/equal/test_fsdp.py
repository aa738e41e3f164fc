"""One run on several ranks that share out weights and batches: the update is that of a single device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.batches import ragged_batch
from tests.equal.ranks import on_ranks
from tests.families import make_model
from tunesmith.config import AdamWConfig, FsdpConfig, FullConfig, SftConfig, SgdConfig, SingleConfig
from tunesmith.engines import build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS
from tunesmith.objectives import build_objective
from tunesmith.tensors import whole

CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": SgdConfig(lr=0.1)},
    "adamw": {"optimizer": AdamWConfig(lr=1e-2)},
    "accumulated": {"optimizer": SgdConfig(lr=0.1), "tokens": 24},
}


def steps(case: dict[str, Any], engine_config: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    method = METHODS["full"](FullConfig(), case["optimizer"], max_grad_norm=1.0)
    engine = build_engine(engine_config, "fp32")
    learner = Learner(make_model("llama", torch.float64), engine, method, case.get("tokens", 10**6))
    objective = build_objective(SftConfig())
    metrics = [learner.step(objective, ragged_batch(pack=False), lr=case["optimizer"].lr) for _ in range(3)]
    return {
        "metrics": [{name: float(x) for name, x in step.items()} for step in metrics],
        "weights": {name: whole(p).detach().clone() for name, p in method.params.items()},
    }


def all_cases() -> dict[str, Any]:
    return {name: steps(case, FsdpConfig(device="cpu")) for name, case in CASES.items()}


def test_x(tmp_path: Path) -> None:
    for found in on_ranks(2, all_cases, tmp_path):
        for name, case in CASES.items():
            alone = steps(case, SingleConfig(device="cpu"))
            print(name, alone["metrics"][-1], found[name]["metrics"][-1])
            for key, weight in alone["weights"].items():
                assert (weight - found[name]["weights"][key]).abs().max() < 1e-12, (name, key)
