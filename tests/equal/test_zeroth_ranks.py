"""One run on several ranks, each a process of its own: what they share out, agree on, and do when one dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.batches import ragged_batch
from tests.equal.test_zeroth import LR, SFT, bits_of, learner_of, settings_of_run, whole_weights, without_fp32
from tests.families import make_model
from tests.product.test_product import equal_bits, losses
from tunesmith.config import ReplicasConfig, RunConfig
from tunesmith.config_file import config_from_dict
from tunesmith.engines import replicas
from tunesmith.engines.replicas import ReplicasEngine
from tunesmith.errors import UserError
from tunesmith.methods.division import Division, check_equal, fingerprint
from tunesmith.methods.update_log import read_log
from tunesmith.replay import replay
from tunesmith.run import train
from tunesmith.run_check import check
from tunesmith.run_folder import read_events

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.equal.test_zeroth_ranks", "peft", "transformers.models.llama"])


def start(world: int, target: Callable[..., None], arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
    """A process for each rank, with what a launcher sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = launcher(rank, world, port) | {"TUNESMITH_CACHE": os.environ["TUNESMITH_CACHE"]}
        processes.append(PROCESSES.Process(target=target, args=(environment, *arguments(rank))))
        processes[-1].start()
    return processes


def launcher(rank: int, world: int, port: int) -> dict[str, str]:
    told = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in told.items()}


def end(processes: Sequence[Any]) -> list[int]:
    """Their exit codes."""
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


# --- the grid of a step, on a learner that is made by hand


def step_on_rank(environment: dict[str, str], file: str, case: dict[str, Any], spoil: tuple[int, str] | None) -> None:
    """Five steps of a rank; leaves losses, coefficients and weights, or the error. spoil: (rank, what) before the third."""
    os.environ.update(environment)
    torch.manual_seed(0)
    engine = ReplicasEngine(ReplicasConfig(device="cpu", timeout_s=20, check_every=2), "fp32")
    learner, found = hand_made(case, engine), {}
    try:
        with engine.group.joined({"case": str(case)}):
            found["losses"] = take_steps(learner, case, spoil if spoil and spoil[0] == engine.group.rank else None)
    except UserError as error:
        found["error"] = str(error)
    method: Any = learner.method
    found |= {"updates": method.updates, "weights": whole_weights(learner), "bits": bits_of(learner)}
    torch.save(found, file)


def hand_made(case: dict[str, Any], engine: Any = None) -> Any:
    dtype = torch.float32 if case.get("scorer") == "in_place" or "directions" in case else torch.float64
    model = make_model("llama", dtype)
    settings = {name: value for name, value in case.items() if name != "pack"}
    return learner_of(
        without_fp32(model) if dtype == torch.float64 else model,
        engine=engine,
        **({"momentum": 0.5, "refresh_every": 2} | settings),
    )


def take_steps(learner: Any, case: dict[str, Any], spoil: tuple[int, str] | None = None) -> list[float]:
    found = []
    for step in range(5):
        if spoil and step == 2:
            part: Any = {
                "gathered": next(iter(learner.method.directions.gathered.values())),
                "weight": next(iter(learner.method.params.values())).data,
            }[spoil[1]]
            part.view(-1)[3] += 1e-6
        found.append(float(learner.step(SFT, ragged_batch(case.get("pack", False)), LR)["loss"]))
    return found


def on_ranks(world: int, folder: Path, case: dict[str, Any], spoil: tuple[int, str] | None = None) -> list[Any]:
    files = [str(folder / f"rank-{rank}.pt") for rank in range(world)]
    assert end(start(world, step_on_rank, lambda rank: (files[rank], case, spoil))) == [0] * world
    return [torch.load(file, weights_only=False) for file in files]


BITS: list[tuple[int, dict[str, Any]]] = [
    (4, {"queries": 4, "scorer": "in_place"}),
    (2, {"queries": 3, "scorer": "in_place", "sides": "one", "scale": "std", "noise": "rademacher"}),
    (2, {"queries": 2, "directions": "dense"}),
]
CLOSE: list[tuple[int, dict[str, Any]]] = [
    (4, {"queries": 4}),
    (2, {"queries": 3, "sides": "one"}),
    (2, {"queries": 1}),
    (3, {"queries": 2, "pack": True}),
]


@pytest.mark.parametrize(("world", "case"), BITS, ids=str)
def test_queries_over_ranks_are_those_of_one_process_to_the_bit(
    tmp_path: Path, world: int, case: dict[str, Any]
) -> None:
    alone = hand_made(case)
    expected = take_steps(alone, case)
    for found in on_ranks(world, tmp_path, case):
        assert found["losses"] == expected
        assert found["updates"] == alone.method.updates
        assert equal_bits(found["weights"], whole_weights(alone))
        assert equal_bits(found["bits"], bits_of(alone))


@pytest.mark.parametrize(("world", "case"), CLOSE, ids=str)
def test_queries_or_samples_over_ranks_are_those_of_one_process(
    tmp_path: Path, world: int, case: dict[str, Any]
) -> None:
    """In fp64: the slopes, which divide a difference of losses by eps, to 1e-10 of their size; and ranks to the bit."""
    alone = hand_made(case)
    expected = take_steps(alone, case)
    ranks = on_ranks(world, tmp_path, case)
    for found in ranks:
        assert found["losses"] == pytest.approx(expected, rel=1e-12)
        for ours, theirs in zip(found["updates"], alone.method.updates, strict=True):
            assert ours.coefficients == pytest.approx(theirs.coefficients, rel=1e-8, abs=1e-10 * LR)
        assert found["updates"] == ranks[0]["updates"]
        assert equal_bits(found["bits"], ranks[0]["bits"])


@pytest.mark.parametrize("what", ["gathered", "weight"])
def test_a_number_that_is_spoilt_on_one_rank_stops_all(tmp_path: Path, what: str) -> None:
    case = {"queries": 3, "scorer": "in_place", "momentum": 0.0}
    for found in on_ranks(3, tmp_path, case, spoil=(1, what)):
        assert "before step 3 the ranks do not all hold the same weights" in found["error"]
        assert "these among themselves: ranks 0, 2; rank 1." in found["error"]
        assert len(found["updates"]) == 2


def test_samples_are_parted_at_the_borders_of_groups() -> None:
    for pack in (False, True):
        batch = ragged_batch(pack)
        for number in range(1, 12):
            parts = batch.parts(number)
            assert len(parts) <= number
            assert sum(len(part.tokens_BT) for part in parts) == len(batch.tokens_BT)
            assert sum(int(part.num_tokens()) for part in parts) == int(batch.num_tokens())
    batch = ragged_batch(False)
    sizes = [int(part.num_tokens()) for part in batch.parts(2)]
    assert max(sizes) - min(sizes) <= max(batch.row_ends())
    from dataclasses import replace

    pairs = replace(batch, group_N=batch.group_N // 2)
    for part in pairs.parts(3):
        here = set(part.sequence_BT[part.sequence_BT >= 0].tolist())
        assert {pairs.group_N[n].item() for n in here}.isdisjoint(pairs.group_N[n].item() for n in set(range(8)) - here)


def test_what_a_lost_rank_should_have_found_is_left_out() -> None:
    by_queries = Division((0, 2, 3), 4)
    assert [list(by_queries.queries_of(rank)) for rank in (0, 2, 3)] == [[0], [1], [2, 3]]
    tables = {0: {"losses": [1.0, 2.0]}, 3: {"losses": [1.0, 2.0, 3.0, 4.0]}}
    assert by_queries.put_together(tables) == [(range(1), tables[0]), (range(2, 4), tables[3])]
    by_samples = Division((0, 2, 3), 2)
    tables = {
        0: {"losses": [0.5, 1.0], "share": 0.25, "a": [[1.0, 2.0], [3.0, 4.0]]},
        2: {},
        3: {"losses": [1.0, 1.5], "share": 0.75, "a": [[0.5, 1.0], [1.0, 1.0]]},
    }
    ((queries, total),) = by_samples.put_together(tables)
    assert (queries, total["losses"], total["a"]) == (range(2), [1.5, 2.5], [[1.5, 3.0], [4.0, 5.0]])
    ((_, total),) = by_samples.put_together({0: tables[0], 2: tables[2]})
    assert total["losses"] == [2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_fingerprint_tells_any_bit(dtype: torch.dtype) -> None:
    x = torch.arange(7).to(dtype)
    y, z = x.clone(), torch.ones(3)
    y[4] += 1
    assert fingerprint([x, z]) == fingerprint([x.clone(), z.clone()])
    assert len({fingerprint([x, z]), fingerprint([y, z]), fingerprint([z, x])}) == 3
    check_equal({0: 5, 1: 5}, 0)


# --- whole runs


def run_on_rank(environment: dict[str, str], tree: dict[str, Any], resume: bool, said: str) -> None:
    os.environ.update(environment)
    replicas.SLICE_S = 0.1  # a rank that was asleep hears at once what it has missed
    try:
        result = train(config_from_dict(tree), resume=resume)
    except UserError as error:
        Path(said).write_text(str(error))
        sys.exit(2)
    sys.exit(0 if result.finished else 130)


def run_on_ranks(configs: Sequence[RunConfig], folder: Path, resume: bool = False) -> list[Any]:
    trees = [config.model_dump(mode="json") for config in configs]
    return start(len(trees), run_on_rank, lambda rank: (trees[rank], resume, str(folder / f"said-{rank}")))


@pytest.fixture
def make_replicas(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    def make(output: str = "run", steps: int = 10, timeout_s: float = 30, **method: Any) -> RunConfig:
        sections = settings_of_run({"scorer": "in_place", **method}, train={"steps": steps, "batch_size": 4})
        sections |= {"engine": {"name": "replicas", "timeout_s": timeout_s}, "output": str(tmp_path / output)}
        return make_config(**sections)

    return make


def wait_for_step(folder: Path, step: int) -> None:
    wait_for(lambda: any(event.get("step", 0) >= step for event in read_events(folder / "events.jsonl")))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def files(folder: Path) -> list[str]:
    """All of them; TensorBoard's have the process in their names, and each writer its own."""
    return sorted(str(path.relative_to(folder)).partition(".tfevents.")[0] for path in folder.rglob("*"))


def test_a_run_on_two_ranks_is_that_of_one_and_rank_0_alone_writes(
    make_config: Callable[..., RunConfig], make_replicas: Callable[..., RunConfig], tmp_path: Path
) -> None:
    configs = [make_replicas("run", queries=2), make_replicas("elsewhere", queries=2)]
    assert end(run_on_ranks(configs, tmp_path)) == [0, 0]
    assert not (tmp_path / "elsewhere").exists()
    alone = train(configs[0].model_copy(update={"output": str(tmp_path / "alone")}))
    for name in ("updates.log", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (alone.folder / name).read_bytes()
    assert files(tmp_path / "run") == files(alone.folder)
    assert losses(tmp_path / "run") == losses(alone.folder)
    ours, theirs = (read_events(folder / "events.jsonl") for folder in (tmp_path / "run", alone.folder))
    assert [event["event"] for event in ours] == [event["event"] for event in theirs]
    for event, other in zip(ours, theirs, strict=True):
        assert event.keys() == other.keys()
        for name in event.keys() & {"step", "tokens", "target_tokens", "loss", "lr", "slope", "entropy"}:
            assert event[name] == pytest.approx(other[name], rel=1e-12)


def test_a_killed_rank_is_dropped_and_the_log_still_leads_to_the_model(
    make_replicas: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_replicas(queries=3, steps=60, timeout_s=4)
    folder = Path(config.output)
    processes = run_on_ranks([config] * 3, tmp_path)
    wait_for_step(folder, 5)
    processes[1].kill()
    assert end(processes) == [0, -signal.SIGKILL, 0]
    events = read_events(folder / "events.jsonl")
    (lost,) = [event for event in events if event["event"] == "rank_lost"]
    assert (lost["rank"], lost["why"]) == (1, "said nothing for 4 s")
    assert events[-1]["event"] == "end"
    _, updates, _ = read_log(folder / "updates.log")
    assert len(updates) == len(losses(folder)) == 60
    assert [n + 1 for n, update in enumerate(updates) if 0.0 in update.coefficients] == [lost["step"]]
    zero, *others = sorted(updates[lost["step"] - 1].coefficients, key=abs)
    assert zero == updates[lost["step"] - 1].coefficients[1] == 0.0
    assert all(others)
    replay(folder, None, tmp_path / "again")
    model = (folder / "model/model.safetensors").read_bytes()
    assert (tmp_path / "again/model.safetensors").read_bytes() == model


def test_a_rank_that_comes_too_late_is_told_so(make_replicas: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_replicas(
        steps=500, timeout_s=4
    )  # one query: samples are shared out; and steps for the other to wake up in
    folder = Path(config.output)
    processes = run_on_ranks([config] * 2, tmp_path)
    wait_for_step(folder, 5)
    os.kill(processes[1].pid, signal.SIGSTOP)
    wait_for(lambda: any(event["event"] == "rank_lost" for event in read_events(folder / "events.jsonl")))
    os.kill(processes[1].pid, signal.SIGCONT)
    assert end(processes) == [0, 2]
    said = (tmp_path / "said-1").read_text()
    assert "rank 1 came too late and was dropped" in said
    assert "raise engine.timeout_s (now 4)" in said
    assert len(losses(folder)) == 500


@pytest.mark.parametrize("what", ["rank 0 is killed", "rank 1 is told to stop"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    make_replicas: Callable[..., RunConfig], tmp_path: Path, what: str
) -> None:
    config = make_replicas(queries=2, steps=60)
    folder = Path(config.output)
    processes = run_on_ranks([config] * 2, tmp_path)
    wait_for_step(folder, 5)
    if what == "rank 0 is killed":
        processes[0].kill()
        assert end(processes) == [-signal.SIGKILL, 2]
        assert "rank 0 is gone" in (tmp_path / "said-1").read_text()
    else:
        os.kill(processes[1].pid, signal.SIGTERM)
        assert end(processes) == [130, 130]
    assert not (folder / "model").exists()
    assert end(run_on_ranks([config] * 2, tmp_path, resume=True)) == [0, 0]
    whole = train(config.model_copy(update={"output": str(tmp_path / "whole")}))
    for name in ("updates.log", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_ranks_that_were_started_otherwise_are_refused(make_replicas: Callable[..., RunConfig], tmp_path: Path) -> None:
    configs = [make_replicas(), make_replicas(eps=0.01), make_replicas()]
    assert end(run_on_ranks(configs, tmp_path)) == [2, 2, 2]
    for rank in range(3):
        said = (tmp_path / f"said-{rank}").read_text()
        assert "\n  rank 1: method.eps is 0.01, on rank 0 0.001\nstart all of them" in said
        assert said.count("\n  ") == 1
    assert not Path(configs[0].output).exists()


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "START_S", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for name, value in launcher(0, 3, taken.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        engine = ReplicasEngine(ReplicasConfig(device="cpu", timeout_s=0.1), "fp32")
        with pytest.raises(UserError, match=r"did not meet .*free port"), engine.group.joined({}):
            pass
    with pytest.raises(UserError, match=r"of 3 ranks 1, 2 did not come within 0\.2 s"), engine.group.joined({}):
        pass


def test_methods_that_want_gradients_are_refused(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="lora needs autograd, which the replicas engine does not offer"):
        check(make_config(engine={"name": "replicas", "device": "cpu"}))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE is set, but MASTER_ADDR, MASTER_PORT is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'; set it to a number"),
    ],
)
def test_half_of_a_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    if "is not" not in message:
        environment = launcher(0, 1, 1) | environment
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        ReplicasEngine(ReplicasConfig(device="cpu"), "fp32")


def test_a_restart_by_torchrun_reads_nothing_of_the_attempt_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent keeps the store over attempts, in which rounds count from 1 again."""
    from torch.distributed import TCPStore

    from tunesmith.engines.replicas import _connect

    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    _connect(0, 2).set("1", "old")
    assert _connect(1, 2).check(["1"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not _connect(1, 2).check(["1"])
