"""Checkpoints that several ranks write together: the same bits after a resume, on any number of ranks, whatever fails."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.equal.ranks import free_port, on_ranks
from tunesmith.config import FsdpConfig, RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.engines import collective, watch
from tunesmith.engines.checkpoint import checkpoints, load_newest
from tunesmith.engines.collective import Collective
from tunesmith.engines.fsdp import mesh_shape
from tunesmith.engines.parts import load_parts, save_parts
from tunesmith.engines.place import place
from tunesmith.errors import UserError
from tunesmith.run import train
from tunesmith.run_folder import read_events

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze": {"method": {"name": "freeze", "last_blocks": 1}},
    "lora": {"method": {"name": "lora", "rank": 4}},
    "chunk": {"method": {"name": "chunk", "layout": "layers", "updates_per_chunk": 1, "order": "ascending"}},
}
ADAMW = {"name": "adamw", "lr": 1e-3, "eps": 1e-4}
"""A step whose rounding is not blown up where a gradient is nearly 0."""
LAYOUTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "whole": ({"replicate": 4}, ["full"]),
    "hybrid": ({"replicate": 2}, ["full", "chunk"]),
    "cut": ({}, ["full", "lora", "chunk"]),
}
"""Four ranks as settings of the engine, and the methods that are tried on them."""
FROM_ONE = ("full", "chunk")
STEPS = 6


def trees(make_config: Callable[..., RunConfig], where: Path, **sections: Any) -> dict[str, dict[str, Any]]:
    """Configuration by method, each with an output folder of its own."""
    defaults = {
        "optimizer": ADAMW,
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 2, "keep": 9, "asynchronous": True},
    }
    return {
        name: make_config(**{**defaults, **settings, **sections}, output=str(where / name)).model_dump(mode="json")
        for name, settings in METHODS.items()
    }


def on_fsdp(tree: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**tree, "engine": {"name": "fsdp", "device": "cpu", "timeout_s": 30, **settings}}


def run(tree: dict[str, Any], resume: bool = False) -> None:
    train(config_from_dict(tree), resume=resume)


def state_of(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors and numbers of the newest checkpoint, whole."""
    found = load_newest(Path(tree["output"]) / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert found[0] == STEPS
    leaves: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                walk(inner, f"{path}/{key}")
        elif isinstance(value, torch.Tensor | int | float):
            leaves[path] = torch.as_tensor(value)

    walk(found[1], "")
    return leaves


def back_at(step: int, before: dict[str, Any], output: Path) -> dict[str, Any]:
    """A copy of a run, as if it had died after this step's checkpoint; all ranks that take part ask for it."""
    if place().rank == 0:
        aside = output.with_name(f"{output.name}.aside")
        shutil.copytree(before["output"], aside)
        shutil.rmtree(aside / "model")
        for path in (aside / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        aside.rename(output)
    while not output.exists():
        time.sleep(0.01)
    return {**before, "output": str(output)}


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel())


def begin_and_resume(trees: dict[str, Any], alone: dict[str, Any], folder: Path) -> None:
    """On two ranks: each run undisturbed, each again from its step 2, and from the step 2 of a single device."""
    for name, tree in trees.items():
        run(on_fsdp(tree))
        run(on_fsdp(back_at(2, tree, folder / "again" / name)), resume=True)
        if name in FROM_ONE:
            run(on_fsdp(back_at(2, alone[name], folder / "from-one" / name)), resume=True)


def resume_on_four(trees: dict[str, Any], folder: Path) -> None:
    for layout, (settings, methods) in LAYOUTS.items():
        for name in methods:
            run(on_fsdp(back_at(2, trees[name], folder / layout / name), **settings), resume=True)


def test_resumed_on_any_number_of_ranks(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    alone = trees(make_config, tmp_path / "one")
    for tree in alone.values():
        run(tree)
    two = trees(make_config, tmp_path / "two")
    on_ranks(2, begin_and_resume, tmp_path, two, alone, tmp_path)
    on_ranks(4, resume_on_four, tmp_path, two, tmp_path)
    for name, tree in two.items():
        files = {path.name for path in (Path(tree["output"]) / "checkpoints/step-2").iterdir()}
        assert {"checkpoint.json", "skeleton.pt", ".metadata"} < files
        expected, of_one = state_of(tree), state_of(alone[name])
        assert differences(expected, state_of({"output": tmp_path / "again" / name})) == 0, name
        if name in FROM_ONE:
            assert differences(of_one, state_of({"output": tmp_path / "from-one" / name})) < 1e-6, name
        assert differences(of_one, expected) < 1e-6, name
        run(
            back_at(2, {**tree, "engine": {"name": "single", "device": "cpu"}}, tmp_path / "to-one" / name), resume=True
        )
        assert differences(expected, state_of({"output": tmp_path / "to-one" / name})) < 1e-6, name
        for layout in (layout for layout, (_, methods) in LAYOUTS.items() if name in methods):
            assert differences(expected, state_of({"output": tmp_path / layout / name})) < 1e-6, (name, layout)


def state(value: float) -> dict[str, Any]:
    """12 × 50000 numbers over the ranks, some that all of them hold, and a word."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = distribute_tensor(torch.full((12, 50_000), value), mesh, [Shard(0)])
    return {"parameters": {"cut": cut, "whole": torch.full((3,), value)}, "more": [{"word": "x", "pair": (1, 2.5)}]}


def room(path: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
    return state(0.0)["parameters"][path[-1]]


def small_files(soft: int) -> None:
    """A write beyond so many bytes fails from now on as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def error_of(work: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        work()
    return str(error.value)


def faults(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What ranks say when something is wrong with one of them."""
    group = Collective(torch.device("cpu"), 60)
    rank, said = group.rank, {}
    for step in (1, 2):
        save_parts(folder / "a", step, state(step), keep=9, ranks=group.writers)
    if rank == 1:
        small_files(10**6)
    said["full disk"] = error_of(lambda: save_parts(folder / "a", 3, state(3), keep=1, ranks=group.writers))
    said["left"] = sorted(path.name for path in (folder / "a").iterdir())
    small_files(resource.RLIM_INFINITY)
    found = load_parts(folder / "a", pytest.fail, room, group.writers)
    said["newest"] = found[0], found[1]["parameters"]["cut"].full_tensor().unique(), found[1]["more"]
    dist.barrier()
    if rank == 1:
        flip_a_byte(folder / "a/step-2/__1_0.distcp")
    dist.barrier()
    warnings: list[str] = []
    said["before"] = load_parts(folder / "a", warnings.append, room, group.writers)[0]
    said["warnings"], said["kept"] = warnings, [path.name for path in checkpoints(folder / "a")]

    if rank == 1:
        small_files(2**16)
    lenient = {"every_steps": 2, "asynchronous": True, "on_failure": "continue"}
    run({**tree, "checkpoint": lenient, "output": str(folder / "lenient")})
    said["stop"] = error_of(lambda: run({**tree, "output": str(folder / "strict")}))
    small_files(resource.RLIM_INFINITY)
    collective.SEEN_S = 0.1
    said["apart"] = error_of(lambda: run({**tree, "output": str(folder / f"apart-{rank}")}))
    said["unlike"] = error_of(lambda: run({**tree, "seed": rank, "output": str(folder / "unlike")}))
    return said


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_what_fails_on_one_rank_fails_on_all(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    tree = on_fsdp(trees(make_config, tmp_path)["full"], timeout_s=60)
    first, second = on_ranks(2, faults, tmp_path, tree, tmp_path)
    assert first["full disk"].startswith(f"{tmp_path}/a/step-3: the checkpoint could not be written: rank 1: ")
    assert "the checkpoints before it are intact: make room, then go on with --resume" in first["full disk"]
    for said in (first, second):
        assert said["full disk"].split(" (")[0] == first["full disk"].split(" (")[0]
        assert said["newest"] == (2, torch.tensor([2.0]), [{"word": "x", "pair": (1, 2.5)}])
        assert said["before"] == 1
        damage = "damaged (the hash of __1_0.distcp is wrong); falling back to the checkpoint before it"
        assert said["warnings"] == [f"{tmp_path}/a/step-2: {damage}"]
        assert said["kept"] == ["step-1"]
        assert said["stop"].startswith(
            f"{tmp_path}/strict/checkpoints/step-2: the checkpoint could not be written: rank 1: "
        )
        assert f"rank 1 on {socket.gethostname()} ({tmp_path}/apart-1)" in said["apart"]
        assert said["unlike"] == (
            "the ranks were not started alike:\n  rank 1: seed is 1, on rank 0 0\nstart all of them with the same "
            "configuration, data and versions"
        )
    assert first["left"] == ["step-1", "step-2"]
    events = read_events(tmp_path / "lenient/events.jsonl")
    assert [event["step"] for event in events if event["event"] == "checkpoint_failed"] == [
        2,
        4,
        6,
        6,
    ]  # at the end once more
    assert events[-1]["event"] == "end"
    assert sorted(path.name for path in (tmp_path / "lenient/checkpoints").iterdir()) == []
    assert (tmp_path / "lenient/model/model.safetensors").is_file()


def late(ports: list[int]) -> list[str]:
    """Rank 1 comes too late in its third step; then it fails with an error of its own."""
    watch.GRACE_S, rank, said = 2.0, place().rank, []
    for case, port in enumerate(ports):
        os.environ["MASTER_PORT"] = str(port)
        group = Collective(torch.device("cpu"), 3)
        try:
            with group.joined({}):
                for step in (1, 2, 3):
                    if rank == 1 and step == 3 and case == 0:
                        time.sleep(8)
                    if rank == 1 and step == 3 and case == 1:
                        raise MemoryError("no more memory")
                    group.at(step, "training")
                    group.agree(step)
        except (UserError, MemoryError) as error:
            said.append(str(error))
        dist.destroy_process_group()
    return said


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    answers = on_ranks(3, late, tmp_path, [free_port(), free_port()])
    for rank in (0, 2):
        assert answers[rank][0].startswith(
            "step 3, training: rank 1 did not come to all_reduce within 3 s (last seen in training of step 2). The run has"
        )
        assert answers[rank][1].startswith("step 3, training: rank 1 ended: no more memory. The run has stopped")
    assert answers[1][0].startswith(
        "step 3, training: the others waited for this rank in vain, or their network failed ("
    )
    assert answers[1][1] == "no more memory"


@pytest.mark.parametrize(
    ("settings", "world", "shape"),
    [
        ({}, 6, (1, 6, 1, 1)),
        ({"replicate": 2}, 6, (2, 3, 1, 1)),
        ({"replicate": 2, "tensor_parallel": 3}, 6, (2, 1, 1, 3)),
        ({"context_parallel": 2, "tensor_parallel": 2}, 8, (1, 2, 2, 2)),
    ],
)
def test_mesh(settings: dict[str, int], world: int, shape: tuple[int, ...]) -> None:
    assert mesh_shape(FsdpConfig(**settings), world) == shape


def test_a_mesh_that_does_not_divide() -> None:
    config = FsdpConfig(replicate=2, tensor_parallel=2)
    assert error_of(lambda: mesh_shape(config, 6)) == (
        "engine.replicate 2 × engine.tensor_parallel 2 does not divide the 6 ranks that were started; change one of them"
    )
