"""One run on several ranks that share out weights and batches: the update is that of a single device."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.batches import ragged_batch
from tests.equal.ranks import on_ranks
from tests.families import make_model
from tunesmith.config import AdamWConfig, FsdpConfig, FullConfig, RunConfig, SftConfig, SgdConfig, SingleConfig
from tunesmith.config_file import config_from_dict
from tunesmith.engines import build_engine
from tunesmith.learner import Learner
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES, build_objective
from tunesmith.run import train
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


SECTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "freeze": {"last_blocks": 1},
    "lora": {"rank": 4},
    "chunk": {"num_chunks": 2, "row_alignment": 8},
}
"""What each method that goes down a gradient needs said."""


def run_all(configs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The errors of the runs that failed."""
    import os

    if os.environ.get("DBG"):
        import sys

        sys.path.insert(0, "/tmp/p7")
        import dbg
    failed = {}
    for name, tree in configs.items():
        try:
            train(config_from_dict(tree))
        except Exception as error:  # the others must be told of, too
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


def test_every_objective_and_method(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    trees = {}
    for objective in os.environ.get('OBJ','').split() or OBJECTIVES:
        for method, settings in SECTIONS.items():
            config = make_config(
                **objective_sections(objective), method={"name": method, **settings},
                optimizer={"name": "sgd", "lr": 0.1}, train={"steps": 3, "batch_size": 5},
            )  # fmt: skip
            if build_objective(config.objective).no_gradient:
                continue
            trees[f"{objective} {method}"] = config.model_dump(mode="json")
    alone = {name: {**tree, "output": f"{tmp_path}/alone/{name}"} for name, tree in trees.items()}
    ranks = {
        name: {**tree, "engine": {"name": "fsdp", "device": "cpu"}, "output": f"{tmp_path}/ranks/{name}"}
        for name, tree in trees.items()
    }
    assert run_all(alone) == {}
    failed = on_ranks(2, run_all, tmp_path, ranks)
    for name in trees:
        if name in failed[0]:
            print("FAILED", name, failed[0][name][:300])
            continue
        expected, found = (
            load_file(f"{tmp_path}/{where}/{name}/model/{file_of(name)}") for where in ("alone", "ranks")
        )
        print(
            name,
            max(float((expected[key] - found[key]).abs().max()) for key in expected),
            expected.keys() == found.keys(),
        )


def file_of(name: str) -> str:
    return "adapter_model.safetensors" if "lora" in name else "model.safetensors"
