"""`tunesmith train --nproc 2`: what torch elastic starts, and what becomes of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.equal.test_zeroth import settings_of_run
from tunesmith.config import RunConfig
from tunesmith.config_file import dump_config
from tunesmith.run import train
from tunesmith.run_folder import read_events

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def make_replicas(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    def make(steps: int) -> RunConfig:
        steps_alone = {"steps": steps, "batch_size": 4, "foresee": False}
        sections = settings_of_run({"scorer": "in_place", "queries": 2}, train=steps_alone)
        return make_config(**sections, engine={"name": "replicas", "device": "cpu"}, output=str(tmp_path / "run"))

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A launcher on two ranks, with its output in one pipe; none outlives its test."""
    started = []

    def launch(config: RunConfig, *words: str) -> subprocess.Popen[str]:
        file = tmp_path / "run.yaml"
        file.write_text(dump_config(config))
        command = [sys.executable, "-m", "tunesmith", "train", str(file), "--nproc", "2", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
        return started[-1]

    yield launch
    for process in started:
        for each in [*psutil.Process(process.pid).children(), process] if process.poll() is None else []:
            each.kill()


def wait_for(launcher: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 150  # a launcher and its ranks each import torch
    while not condition():
        assert launcher.poll() is None, launcher.stdout and launcher.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_step(launcher: subprocess.Popen[str], folder: Path, step: int) -> None:
    wait_for(launcher, lambda: any(event.get("step", 0) >= step for event in read_events(folder / "events.jsonl")))


def ranks(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    return {int(each.environ()["RANK"]): each for each in psutil.Process(launcher.pid).children()}


def said(launcher: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code, and the lines of the output that are ours: before the header and between steps."""
    text, _ = launcher.communicate(timeout=150)
    return launcher.returncode, [
        line for line in text.splitlines() if line.startswith(("error", "warning", "stopped", "rank"))
    ]


def same_bits(config: RunConfig, folder: Path) -> bool:
    """Whether two ranks' run is that of one, to the bit."""
    whole = train(config.model_copy(update={"output": str(folder)}))
    names = ("updates.log", "model/model.safetensors")
    return all((Path(config.output) / name).read_bytes() == (whole.folder / name).read_bytes() for name in names)


@pytest.mark.slow
def test_a_run_on_two_ranks_is_that_of_one(
    make_replicas: Callable[..., RunConfig], start: Start, tmp_path: Path
) -> None:
    config = make_replicas(steps=10)
    launcher = start(config)
    text, _ = launcher.communicate(timeout=150)
    assert launcher.returncode == 0
    assert "2 ranks" in text
    assert text.count("held-out loss at step 10") == 1
    assert "torch.distributed" not in text
    assert same_bits(config, tmp_path / "alone")


def test_a_killed_rank_comes_back_and_the_run_ends_as_if_nothing_had_been(
    make_replicas: Callable[..., RunConfig], start: Start, tmp_path: Path
) -> None:
    config = make_replicas(steps=120)
    folder = Path(config.output)
    launcher = start(config)
    wait_for_step(launcher, folder, 5)
    ranks(launcher)[1].kill()
    code, lines = said(launcher)
    assert code == 0
    assert lines == [
        "warning: rank 1 was killed by SIGKILL (out of memory?); all ranks start again, from the last checkpoint "
        "(restart 1 of 3)"
    ]
    events = read_events(folder / "events.jsonl")
    assert [event["event"] for event in events if event["event"] in ("start", "resume", "end", "rank_lost")] == [
        "start", "resume", "end",
    ]  # fmt: skip
    assert same_bits(config, tmp_path / "alone")


def test_a_killed_rank_of_sharded_weights_comes_back(
    make_config: Callable[..., RunConfig], start: Start, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "checkpoint": {"every_steps": 10}, "train": {"steps": 80, "batch_size": 4, "foresee": False},
        "optimizer": {"name": "sgd", "lr": 0.05},
    }  # fmt: skip
    config = make_config(**sections, engine={"name": "auto", "device": "cpu"}, output=str(tmp_path / "run"))
    folder = Path(config.output)
    launcher = start(config)
    wait_for(launcher, lambda: any((folder / "checkpoints").glob("step-*")))
    ranks(launcher)[1].kill()
    code, lines = said(launcher)
    assert code == 0, lines
    told = [event for event in read_events(folder / "events.jsonl") if event["event"] in ("start", "resume", "end")]
    assert [event["event"] for event in told] == ["start", "resume", "end"]
    assert told[1]["step"] >= 10
    whole = train(config.model_copy(update={"output": str(tmp_path / "alone")}))
    ours, theirs = (load_file(each / "model/adapter_model.safetensors") for each in (folder, whole.folder))
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, rtol=0.0, atol=1e-6), name


@pytest.mark.slow
def test_a_rank_that_dies_too_often_ends_the_run(make_replicas: Callable[..., RunConfig], start: Start) -> None:
    config = make_replicas(steps=5000)
    launcher = start(config, "--max-restarts", "0")
    wait_for_step(launcher, Path(config.output), 5)
    others = ranks(launcher)
    others[0].kill()
    code, lines = said(launcher)
    assert code == 1
    assert lines == [
        "error: rank 0 was killed by SIGKILL (out of memory?); the run has stopped; go on with it with --resume"
    ]
    assert not others[1].is_running()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_saves_and_stops(
    make_replicas: Callable[..., RunConfig], start: Start, tmp_path: Path, number: int
) -> None:
    config = make_replicas(steps=5000)
    folder = Path(config.output)
    launcher = start(config, "checkpoint.every_steps=0")
    wait_for_step(launcher, folder, 5)
    for process in (launcher, *ranks(launcher).values()):  # as a scheduler does it; the launcher passes its own on
        process.send_signal(number)
    code, lines = said(launcher)
    assert code == 130
    last = read_events(folder / "events.jsonl")[-1]
    assert last["event"] == "checkpoint"
    assert lines == [f"stopped after step {last['step']} and saved; go on with: tunesmith train --resume "]
    assert (folder / f"checkpoints/step-{last['step']}").is_dir()
    assert not (folder / "model").exists()


def test_what_the_user_must_mend_is_said_once(
    make_replicas: Callable[..., RunConfig], start: Start, tmp_path: Path
) -> None:
    config = make_replicas(steps=10)
    code, lines = said(start(config, "data.eval_fraction=0", "data.path=no.jsonl"))
    assert code == 2
    lines = [line.replace("rank 1: ", "") for line in lines]  # where rank 0 is so late that it has not said the same
    assert lines == [f"error: no.jsonl: no such data file; check data.path (now in {Path.cwd()})"]
    assert not Path(config.output).exists()
    Path(config.output).mkdir()
    (Path(config.output) / "mine").touch()
    assert said(start(config)) == (2, [f"error: {config.output}: exists and is no empty folder; choose another output"])


def test_a_port_that_another_program_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr("tunesmith.elastic.ANSWER_S", 1.0)
        from tunesmith.elastic import Job, run_agent
        from tunesmith.errors import UserError

        job = Job("x", 1, 2, endpoint, False, "127.0.0.1", 0, 1)
        with pytest.raises(
            UserError, match=f"--rendezvous {endpoint}: what listens there is no rendezvous of tunesmith"
        ):
            run_agent(job, (sys.executable, "-c", ""), print)


def test_hosts_that_do_not_come_are_told_of() -> None:
    from tunesmith.elastic import Job, run_agent
    from tunesmith.errors import UserError

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    job: Any = Job("x", 1, 2, endpoint, True, "127.0.0.1", 0, 1)
    with pytest.raises(UserError, match="not all 2 hosts have come within 1 s; start the same command"):
        run_agent(job, (sys.executable, "-c", ""), print)


def test_a_wait_for_other_hosts_can_be_ended(make_replicas: Callable[..., RunConfig], start: Start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = start(make_replicas(steps=10), "--nodes", "2", "--rendezvous", endpoint)
    wait_for(launcher, lambda: _listens(endpoint))
    launcher.send_signal(signal.SIGINT)
    assert said(launcher) == (130, [])


def _listens(endpoint: str) -> bool:
    from tunesmith.launch import knock, parse_endpoint

    return not knock(*parse_endpoint(endpoint))
