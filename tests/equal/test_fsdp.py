"""One run on several ranks that share out weights and batches: its updates are those of a single device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.batches import ragged_batch
from tests.equal.ranks import on_ranks
from tests.families import make_model
from tests.product.test_product import losses
from tunesmith.config import (
    AdafactorConfig,
    AdamW8bitConfig,
    AdamWConfig,
    ChunkConfig,
    FreezeConfig,
    FsdpConfig,
    FullConfig,
    LionConfig,
    LoraConfig,
    MuonConfig,
    RunConfig,
    SftConfig,
    SgdConfig,
    SingleConfig,
)
from tunesmith.config_file import config_from_dict
from tunesmith.engines import build_engine
from tunesmith.engines.fsdp import mesh_shape
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.methods import METHODS, Extent
from tunesmith.objectives import OBJECTIVES, build_objective
from tunesmith.run import build, train
from tunesmith.run_folder import read_events
from tunesmith.tensors import whole

# --- a learner made by hand, in fp64

SGD, ADAMW = SgdConfig(lr=0.1), AdamWConfig(lr=1e-2)

ON_TWO: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"optimizer": SgdConfig(lr=0.1, momentum=0.9)},
    "adamw": {"optimizer": ADAMW},
    "lion": {"optimizer": LionConfig(lr=1e-3)},
    "muon": {"optimizer": MuonConfig(lr=1e-3)},
    "adafactor, whole on all": {"optimizer": AdafactorConfig(lr=1e-2), "engine": {"replicate": 2}},
    "adamw8bit, whole on all": {"optimizer": AdamW8bitConfig(lr=1e-2), "engine": {"replicate": 2}},
    "clipped": {"max_grad_norm": 0.1},
    "accumulated": {"tokens": 24},
    "packed, accumulated": {"pack": True, "tokens": 16, "optimizer": ADAMW},
    "more ranks than rows": {"rows": 1, "optimizer": ADAMW},
    "checkpointed": {"engine": {"activation_checkpointing": True}},
    "not let go": {"engine": {"reshard_after_forward": False}},
    "whole on all": {"engine": {"replicate": 2}, "optimizer": ADAMW, "tokens": 24},
    "lora": {"method": LoraConfig(rank=4, alpha=8.0), "optimizer": ADAMW, "tokens": 24},
    "tensor": {"engine": {"tensor_parallel": 2}, "optimizer": ADAMW, "tokens": 24},
    "tensor, partial gradients": {"engine": {"tensor_parallel": 2}, "family": "qwen3", "max_grad_norm": 0.1},
    "tensor, lora": {"engine": {"tensor_parallel": 2}, "method": LoraConfig(rank=4, alpha=8.0), "optimizer": ADAMW},
    "tensor, frozen": {"engine": {"tensor_parallel": 2}, "method": FreezeConfig(patterns=("*.q_proj.*",))},
    "dora": {"method": LoraConfig(rank=4, alpha=8.0, dora=True)},
    "lora, head in full": {
        "method": LoraConfig(rank=4, alpha=8.0, modules_to_save=("lm_head",)),
        "tokens": 24,
        "rows": 7,
    },
    "lora, head in full, empty": {
        "method": LoraConfig(rank=4, alpha=8.0, modules_to_save=("lm_head",)),
        "rows": 1,
    },
    "chunk, evaluated": {
        "method": ChunkConfig(num_chunks=3, updates_per_chunk=1, order="ascending"),
        "optimizer": ADAMW,
        "evaluate": True,
    },
    "freeze": {"method": FreezeConfig(patterns=("lm_head.*",)), "optimizer": ADAMW},
    **{family: {"family": family, "tokens": 24} for family in ("qwen3_moe", "gemma3_text", "gpt2", "mamba")},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "hybrid": {"engine": {"replicate": 2}, "optimizer": ADAMW, "tokens": 24},
    "tensor and parts": {"engine": {"tensor_parallel": 2}, "family": "qwen3", "optimizer": ADAMW, "tokens": 24},
    "tensor and copies": {"engine": {"tensor_parallel": 2, "replicate": 2}, "family": "phi3", "tokens": 24},
    "four parts": {"family": "qwen3", "tokens": 24},
}

BOUND = {"lion": 0.0, "muon": 5e-4, "gemma3_text": 1e-7}
"""1e-12 else. Lion takes signs; Muon multiplies in bf16 (of halves by themselves its steps would differ by 2e-3); Gemma's own
code sums in fp32."""


def take_steps(case: dict[str, Any], engine_config: Any) -> dict[str, Any]:
    """Metrics of three steps, and the weights after them."""
    torch.manual_seed(0)
    section, optimizer = case.get("method", FullConfig()), case.get("optimizer", SGD)
    extent = Extent(steps=3)
    method = METHODS[section.name](section, optimizer, max_grad_norm=case.get("max_grad_norm", 1.0), extent=extent)
    model = make_model(case.get("family", "llama"), torch.float64)
    learner = Learner(model, build_engine(engine_config, "fp32"), method, case.get("tokens", 10**6))
    objective = build_objective(SftConfig())
    batch = ragged_batch(case.get("pack", False))
    batch = batch.rows(0, case.get("rows", len(batch.tokens_BT)))
    metrics = []
    for _ in range(3):
        if case.get("evaluate"):
            learner.evaluate(objective, [batch], {})
        metrics.append(learner.step(objective, batch, lr=optimizer.lr))
    return {
        "metrics": [{name: float(x) for name, x in step.items()} for step in metrics],
        "weights": {name: whole(p.detach()).clone() for name, p in method.params.items()},
    }


def take_all_steps(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: take_steps(case, FsdpConfig(device="cpu", **case.get("engine", {}))) for name, case in cases.items()}


@pytest.mark.parametrize(("world", "cases"), [(2, ON_TWO), (4, ON_FOUR)], ids=["2 ranks", "4 ranks"])
def test_steps_of_ranks_are_those_of_one_device(world: int, cases: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    ranks = on_ranks(world, take_all_steps, tmp_path, cases)
    for name, case in cases.items():
        checkpointing = case.get("engine", {}).get("activation_checkpointing", False)
        alone = take_steps(case, SingleConfig(device="cpu", activation_checkpointing=checkpointing))
        for found in (of_rank[name] for of_rank in ranks):
            for ours, theirs in zip(found["metrics"], alone["metrics"], strict=True):
                assert ours == pytest.approx(theirs, rel=max(1e-9, BOUND.get(name, 0))), name
            assert found["weights"].keys() == alone["weights"].keys()
            error = max(float((found["weights"][key] - weight).abs().max()) for key, weight in alone["weights"].items())
            assert error <= BOUND.get(name, 1e-12), (name, error)


# --- whole runs

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "freeze": {"last_blocks": 1},
    "lora": {"rank": 4},
    "chunk": {"num_chunks": 2, "row_alignment": 8},
}
CELLS = [
    (objective, method) for objective in OBJECTIVES for method in METHODS if "autograd" in METHODS[method].requires
]
MORE = [("sft", "full"), ("dpo", "lora"), ("kto", "chunk"), ("reward", "lora")]
"""With AdamW and 4 or more micro-batches a step, too."""


def run_all(trees: dict[str, dict[str, Any]], resume: bool = False) -> None:
    for tree in trees.values():
        train(config_from_dict(tree), resume=resume)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


def check_equal(one: Path, other: Path, bound: float) -> None:
    """The same losses and weights."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-5, abs=1e-6), one.name
    first, second = (
        [event["loss"] for event in read_events(folder / "events.jsonl") if event["event"] == "eval"]
        for folder in (one, other)
    )
    assert first == pytest.approx(second, rel=1e-5, abs=1e-6), one.name
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    error = max(float((weight - theirs[key]).abs().max()) for key, weight in ours.items())
    assert error <= bound, (one.name, error)


@pytest.fixture
def trees(
    make_config: Callable[..., RunConfig], objective_sections: Callable[[str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By name a configuration of every objective with every method that goes down a gradient."""
    found = {}
    for objective, method in CELLS:
        sections = objective_sections(objective)
        if build_objective(make_config(**sections).objective).no_gradient:
            continue
        settings = {"name": method, **METHOD_SETTINGS.get(method, {})}
        for more in (False, True) if (objective, method) in MORE else (False,):
            optimizer = {"name": "adamw", "lr": 1e-2, "eps": 1e-3} if more else {"name": "sgd", "lr": 0.1}
            size = {"steps": 3, "batch_size": 5, "micro_batch_tokens": 40 if more else 4096}
            config = make_config(**sections, method=settings, optimizer=optimizer, train=size)
            found[f"{objective} {method}" + (" more" if more else "")] = config.model_dump(mode="json")
    return found


MESHES: list[Any] = [
    pytest.param(2, {"name": "fsdp"}, id="shard", marks=pytest.mark.slow),
    pytest.param(2, {"name": "fsdp", "replicate": 2}, id="replicate", marks=pytest.mark.slow),
    pytest.param(2, {"name": "fsdp", "tensor_parallel": 2}, id="tensor", marks=pytest.mark.slow),
    pytest.param(2, {"name": "fsdp", "context_parallel": 2}, id="context", marks=pytest.mark.slow),
    pytest.param(4, {"name": "fsdp", "tensor_parallel": 2}, id="shard and tensor", marks=pytest.mark.slow),
]


def compare_runs(world: int, engine: dict[str, Any], trees: dict[str, dict[str, Any]], folder: Path) -> None:
    alone = {name: {**tree, "output": f"{folder}/alone/{name}"} for name, tree in trees.items()}
    ranks = {
        name: {**tree, "engine": {**engine, "device": "cpu"}, "output": f"{folder}/ranks/{name}"}
        for name, tree in trees.items()
    }
    run_all(alone)
    on_ranks(world, run_all, folder, ranks)
    for name in trees:
        check_equal(folder / "ranks" / name, folder / "alone" / name, bound=1e-6)


def test_every_objective_and_every_method_on_two_ranks(trees: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Each objective with lora, and each method with sft; all pairs of them: make ranks."""
    some = {name: tree for name, tree in trees.items() if name.startswith("sft ") or " lora" in name or "more" in name}
    compare_runs(2, {"name": "auto"}, some, tmp_path)


@pytest.mark.parametrize(("world", "engine"), MESHES)
def test_every_objective_with_every_method_on_ranks(
    world: int, engine: dict[str, Any], trees: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    compare_runs(world, engine, trees, tmp_path)


# --- who reads what


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_any_number_of_ranks_reads_each_sample_of_an_epoch_once(
    make_config: Callable[..., RunConfig], pack: bool
) -> None:
    """A batch is a function of the step alone, also after a resume; so it is enough that ranks part each batch."""
    run = build(
        make_config(train={"epochs": 1, "batch_size": 6}, data={"pack": pack, "max_tokens": 64, "eval_fraction": 0.0})
    )
    for world in (1, 2, 4, 7):
        seen: list[int] = []
        for step in range(run.steps):
            batch = run.data(step)
            parts = batch.parts(world)
            assert len(parts) <= world
            own = [part.sequence_BT[part.sequence_BT >= 0].unique() for part in parts]
            assert sorted(torch.cat(own).tolist()) == list(range(6))
            seen += batch.sample_N.tolist()
        assert sorted(seen) == list(range(len(run.samples))), world


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("tokens", [1, 48, 10**6])
def test_micro_batches_of_ranks_are_those_of_their_parts(pack: bool, tokens: int) -> None:
    batch = ragged_batch(pack)
    batch = replace(batch, group_N=batch.group_N // 2)  # pairs
    for world in (1, 2, 3, 7):
        pieces = [part.split(tokens) for part in batch.parts(world)]
        borders = batch.split_borders(tokens, world)
        assert [len(own) - 1 for own in borders] == [len(own) for own in pieces]
        assert [own[0] for own in borders[1:]] == [own[-1] for own in borders[:-1]]
        for own, part in zip(borders, pieces, strict=True):
            for start, stop, piece in zip(own[:-1], own[1:], part, strict=True):
                assert torch.equal(batch.rows(start, stop).tokens_BT, piece.tokens_BT)


def test_padding_for_ranks_that_have_nothing_counts_for_nothing() -> None:
    batch = ragged_batch(pack=True)
    nothing = batch.nothing()
    assert not nothing.num_tokens()
    assert not nothing.weights_BT.any()
    assert [len(tokens) for tokens, _ in nothing.sequences()] == [0] * len(batch.sample_N)


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 4}, "engine.tensor_parallel 4 does not divide the 6 ranks"),
        (
            {"replicate": 2, "context_parallel": 2},
            "engine.replicate 2 × engine.context_parallel 2 does not divide the 6",
        ),
    ],
)
def test_ranks_that_no_mesh_can_be_made_of_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mesh_shape(FsdpConfig(**settings), 6)


def test_a_mesh_takes_all_ranks() -> None:
    assert mesh_shape(FsdpConfig(), 6) == (1, 6, 1, 1)
    assert mesh_shape(FsdpConfig(replicate=2, tensor_parallel=3), 12) == (2, 2, 1, 3)


def test_one_device_is_refused_to_several_processes(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="engine: single runs on one device, but 2 processes were started"):
        train(make_config())
