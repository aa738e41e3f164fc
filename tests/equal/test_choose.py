"""engine: auto on several ranks: what it takes of what fits, and that the run is the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.equal.ranks import on_ranks
from tests.equal.test_fsdp import check_equal, run_all
from tunesmith.config import FsdpConfig, RunConfig
from tunesmith.plan.choose import Ranks, candidates, first_that_fits, on, ranks_of
from tunesmith.plan.ranks import needed, plan_on
from tunesmith.run import train
from tunesmith.run_data import open_data

SHARDS = FsdpConfig(device="cpu")


def test_ways_go_from_copies_to_parts_of_layers() -> None:
    one_host = [way for _, way in candidates(SHARDS, Ranks(4, 4, "cuda", 0))]
    assert [(way.replicate, way.tensor_parallel) for way in one_host] == [(4, 1), (1, 1), (1, 2), (1, 4)]
    two_hosts = [way for _, way in candidates(SHARDS, Ranks(4, 2, "cuda", 0))]
    assert [(way.replicate, way.tensor_parallel) for way in two_hosts] == [(4, 1), (2, 1), (1, 1), (1, 2)]


def test_ranks_of_a_host_share_its_memory() -> None:
    told = [("a", 60), ("a", 60), ("b", 40), ("b", 40)]
    assert ranks_of("cpu", told) == Ranks(4, 2, "cpu", 20)
    assert ranks_of("cuda", told) == Ranks(4, 2, "cuda", 40)
    assert ranks_of("cuda", told[1:]) == Ranks(3, 1, "cuda", 40)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_first_that_fits_is_taken(make_config: Callable[..., RunConfig], method: str) -> None:
    config = make_config(method=method, engine=SHARDS.model_dump(), train={"steps": 2, "batch_size": 8})
    data, ways = open_data(config), list(candidates(SHARDS, Ranks(4, 2, "cpu", 0)))
    sizes = {name: needed(plan_on(on(data, way), 4), "cpu") for name, way in ways}
    falling = list(sizes.values())[:3]
    assert falling == sorted(set(falling), reverse=True)
    for memory in (*sizes.values(), 0):
        choice = first_that_fits(config, Ranks(4, 2, "cpu", memory), ways)
        fits = [name for name in sizes if sizes[name] <= memory]
        expected = fits[0] if fits else min(sizes, key=lambda name: sizes[name])
        assert choice.engine == dict(ways)[expected]
        assert expected in choice.why
        assert ("all more than" in choice.why) == (not fits)


def test_a_run_that_chooses_is_the_same_run(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "method": "full",
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"steps": 3, "batch_size": 5, "foresee": True},
    }
    alone = make_config(**settings, output=str(tmp_path / "alone"))
    engine = {"name": "auto", "device": "cpu"}
    wide = make_config(**settings, engine=engine, output=str(tmp_path / "wide"))
    settings["train"] = {**settings["train"], "memory": 1}  # nothing fits: what takes the least
    narrow = make_config(**settings, engine=engine, output=str(tmp_path / "narrow"))
    train(alone)
    on_ranks(2, run_all, tmp_path, {run.output: run.model_dump(mode="json") for run in (wide, narrow)})
    for run, why in ((wide, "a copy on every rank"), (narrow, "all more than the 1 B")):
        check_equal(Path(run.output), Path(alone.output), 1e-6)
        manifest = json.loads((Path(run.output) / "manifest.json").read_text())
        assert why in dict(manifest["header"])["shared out"]
        assert "name: auto" in (Path(run.output) / "config.yaml").read_text()
