"""Which rank a process is by what its environment says, and what a launcher is to start."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.config import RunConfig
from tunesmith.engines.place import VARIABLES, Place, first_host, place, step_variables
from tunesmith.errors import PeerError, UserError
from tunesmith.interrupt import StopRequest
from tunesmith.launch import Launch, exit_code, hold_or_find, knock, own_address, parse_endpoint, rank_variables
from tunesmith.run_folder import RunFolder

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
}  # fmt: skip
BATCH_SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPERATOR = {
    "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "run-master-0", "MASTER_PORT": "23456", "PET_NPROC_PER_NODE": "auto",
}  # fmt: skip
RAY = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "40000",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place()),
        (BATCH_SCRIPT, Place()),
        (TORCHRUN, Place(5, 8, 1, "node1", 29500, "x")),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, Place(5, 8, 1, "node1", 29500)),
        (SRUN, Place(5, 8, 1, "gpu07", 24711, "slurm-4711.0")),
        (SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}, Place(5, 8, 1, "10.0.0.7", 1234, "slurm-4711.0")),
        (SRUN | TORCHRUN, Place(5, 8, 1, "node1", 29500, "x")),
        (OPERATOR, Place(1, 2, 1, "run-master-0", 23456)),
        (OPERATOR | {"TUNESMITH_JOB": "mine"}, Place(1, 2, 1, "run-master-0", 23456, "mine")),
        (RAY, Place(1, 2, 1, "10.0.0.1", 40000)),
    ],
    ids=["alone", "batch script", "torchrun", "torchrun unnamed", "srun", "srun with an address", "torchrun in srun",
         "operator", "operator named", "ray"],
)  # fmt: skip
def test_place(environment: dict[str, str], expected: Place) -> None:
    assert place(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "0"},
            "RANK is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not; start with torchrun, or set all",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "WORLD_SIZE, MASTER_ADDR is set, but RANK, MASTER_PORT is not"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'; set it to a number"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8, but WORLD_SIZE 8; ranks count from 0"),
        (OPERATOR | {"PET_NPROC_PER_NODE": "4"}, "start 4 processes .* torchrun -m tunesmith train"),
    ],
)
def test_half_a_place_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        place(environment)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[3,5-6]", "gpu3"),
        ("r[1-2]n[01-16].example.org,x", "r1n01.example.org"),
        ("a-b-3", "a-b-3"),
    ],
)
def test_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_only_tasks_of_srun_get_variables() -> None:
    assert step_variables(BATCH_SCRIPT) == step_variables(SRUN | TORCHRUN) == {}
    assert step_variables(SRUN) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "24711",
    }  # fmt: skip


@pytest.fixture
def single(make_config: Callable[..., RunConfig]) -> RunConfig:
    return make_config()


@pytest.fixture
def several(make_config: Callable[..., RunConfig]) -> RunConfig:
    return make_config(
        engine={"name": "replicas", "device": "cpu"}, method={"name": "zeroth"}, optimizer={"name": "sgd"}
    )


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    for name in (*VARIABLES, "LOCAL_RANK", *SRUN):
        monkeypatch.delenv(name, raising=False)

    def become(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return become


def test_processes_to_start(
    single: RunConfig,
    several: RunConfig,
    environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meet = {"nodes": 2, "rendezvous": "node1:29400"}
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    assert Launch().processes(single) == Launch("1").processes(single) == Launch("1").processes(several) == 0
    assert Launch().processes(several) == 4
    assert Launch("2").processes(several) == 2
    assert Launch("1", **meet).processes(several) == 1
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    assert Launch().processes(several) == 0
    assert Launch(**meet).processes(several) == 1
    environment(SRUN)
    assert Launch().processes(several) == Launch().processes(single) == 0
    assert Launch("2", **meet).processes(several) == 2  # srun starts the launchers
    environment(TORCHRUN)
    assert Launch().processes(several) == 0


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch("many"), "--nproc many: give auto or a number from 1"),
        (Launch("0"), "--nproc 0"),
        (Launch("2"), "engine: single is one process, but 2 are asked for"),
        (Launch(nodes=2), "--nodes 2 needs --rendezvous HOST:PORT"),
        (Launch(nodes=2, rendezvous="a:1"), "engine: single is one process, but 2 are asked for"),
    ],
)
def test_what_cannot_be_launched(
    single: RunConfig, environment: Callable[[dict[str, str]], None], launch: Launch, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        launch.processes(single)


def test_inside_a_job_nothing_is_launched(several: RunConfig, environment: Callable[[dict[str, str]], None]) -> None:
    environment(TORCHRUN)
    with pytest.raises(UserError, match=r"--nproc, --nodes: this process is rank 5 of 8 already"):
        Launch("2", nodes=2).processes(several)


def test_endpoints() -> None:
    assert parse_endpoint("node1:29400") == ("node1", 29400)
    assert parse_endpoint("[fe80::1]:80") == ("fe80::1", 80)
    for text in ("node1", "node1:", ":80", "node1:port", "node1:0", "node1:70000"):
        with pytest.raises(UserError, match="give HOST:PORT"):
            parse_endpoint(text)


def test_a_rendezvous_is_held_here_or_found_or_named_as_unreachable() -> None:
    told: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert knock("127.0.0.1", port) == "nothing listens there"
        with pytest.raises(
            UserError, match=rf"127.0.0.1:{port}: nothing listens there, for 0 s; see that tunesmith runs on"
        ):
            hold_or_find("127.0.0.1", port, 0, told.append)
        taken.listen()
        assert not hold_or_find("127.0.0.1", port, 0, told.append)
    assert hold_or_find("127.0.0.1", port, 0, told.append)
    assert not told
    with pytest.raises(UserError, match=r"no host is known here by the name of no-such-host\.invalid"):
        hold_or_find("no-such-host.invalid", port, 0, told.append)


def test_a_host_that_only_knows_itself_is_called_by_its_name() -> None:
    assert own_address("localhost", 29400) == "localhost"


def test_what_is_set_already_stays() -> None:
    found = rank_variables(2, "127.0.0.1", {"OMP_NUM_THREADS": "3"})
    assert found["TUNESMITH_LAUNCHED"] == "1"
    assert "OMP_NUM_THREADS" not in found


def test_exit_codes() -> None:
    assert exit_code(UserError("x")) == 2
    assert exit_code(PeerError("x")) == 75


def test_a_folder_that_this_job_has_begun_is_no_other_run(tmp_path: Path, single: RunConfig) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.was_begun_by("a")
    folder.write_manifest({"job": "a"})
    folder.check_free("a")
    assert not folder.was_begun_by("a")  # it was killed before it had begun
    folder.claim(single)
    assert folder.was_begun_by("a")
    folder.check_free("a")
    assert not folder.was_begun_by("b")
    assert not folder.was_begun_by("")
    for job in ("b", ""):
        with pytest.raises(UserError, match="already holds a run"):
            folder.check_free(job)


@pytest.mark.usefixtures("plain_signals")
def test_a_signal_that_comes_twice_at_once_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    now = 100.0
    monkeypatch.setattr("tunesmith.interrupt.monotonic", lambda: now)
    with StopRequest() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop()
    signal.raise_signal(signal.SIGINT)  # while the rest is done after saving
    now = 102.0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
