"""Damaged checkpoints are passed over, a failed write loses nothing, old ones go."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config import RunConfig
from tunesmith.engines import single
from tunesmith.engines.checkpoint import NotWritten, checkpoints, load_newest, save_checkpoint
from tunesmith.errors import UserError
from tunesmith.run import train
from tunesmith.run_folder import read_events


def state(value: float) -> dict[str, Any]:
    return {
        "parameters": {"w": torch.full((1000,), value)},
        "optimizer": [{"state": {0: {"step": torch.tensor(value)}}}],
    }


def saved(tmp_path: Path, steps: int = 3, keep: int = 9) -> Path:
    for step in range(1, steps + 1):
        save_checkpoint(tmp_path, step, state(step), keep)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    assert names(saved(tmp_path, steps=12, keep=2)) == ["step-11", "step-12"]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-11", "step-12"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name", "problem"),
    [
        (truncate, "state.pt", "state.pt has {small} bytes instead of {size}"),
        (flip_a_byte, "state.pt", "the hash of state.pt is wrong"),
        (Path.unlink, "state.pt", "state.pt is missing"),
        (Path.unlink, "checkpoint.json", "checkpoint.json is missing or unreadable"),
        (truncate, "checkpoint.json", "checkpoint.json is missing or unreadable"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None], name: str, problem: str
) -> None:
    newest = saved(tmp_path) / "step-3"
    size = (newest / "state.pt").stat().st_size
    damage(newest / name)
    said: list[str] = []
    step, loaded = load_newest(tmp_path, said.append)
    assert step == 2
    assert torch.equal(loaded["parameters"]["w"], state(2.0)["parameters"]["w"])
    problem = problem.format(size=size, small=size - 100)
    assert said == [f"{newest}: damaged ({problem}); falling back to the checkpoint before it"]


def test_all_damaged(tmp_path: Path) -> None:
    for path in checkpoints(saved(tmp_path)):
        flip_a_byte(path / "state.pt")
    with pytest.raises(UserError, match="every checkpoint is damaged; start the run again in another output folder"):
        load_newest(tmp_path, lambda text: None)


def test_none_at_all(tmp_path: Path) -> None:
    assert load_newest(tmp_path, pytest.fail) is None


@pytest.fixture
def full_disk() -> Any:
    """No file may grow beyond 64 KiB: a write fails as on a full disk."""
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_failed_write_loses_nothing(tmp_path: Path, full_disk: None) -> None:
    saved(tmp_path)
    large = {"parameters": {"w": torch.zeros(10**6)}, "optimizer": []}
    with pytest.raises(UserError) as error:
        save_checkpoint(tmp_path, 4, large, keep=1)
    assert str(error.value).startswith(f"{tmp_path}/step-4: the checkpoint could not be written: ")
    assert "the checkpoints before it are intact: make room, then go on with --resume" in str(error.value)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    assert load_newest(tmp_path, pytest.fail)[0] == 3


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(train={"steps": 4}, checkpoint={"every_steps": 1, "keep": 3})
    first = train(config)
    expected = (first.folder / "model/adapter_model.safetensors").read_bytes()
    flip_a_byte(first.folder / "checkpoints/step-4/state.pt")
    train(config, resume=True)
    assert (first.folder / "model/adapter_model.safetensors").read_bytes() == expected


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    for name in (".writing-7", ".removing-step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"half")
    assert names(saved(tmp_path, steps=1)) == ["step-1"]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    flip_a_byte(saved(tmp_path) / "step-3/state.pt")
    assert load_newest(tmp_path, lambda text: None)[0] == 2
    save_checkpoint(tmp_path, 3, state(3), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2", "step-3"]
    assert load_newest(tmp_path, pytest.fail)[0] == 3


def events(config: RunConfig, kind: str) -> list[int]:
    return [event["step"] for event in read_events(Path(config.output) / "events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize("method", ["full", "chunk"])
def test_training_goes_on_while_a_checkpoint_is_written(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings = {"method": {"name": method, **({"num_chunks": 2, "row_alignment": 8} if method == "chunk" else {})}}
    waiting = make_config(**settings, checkpoint={"every_steps": 2, "keep": 9}, output=str(tmp_path / "waiting"))
    beside = make_config(**settings, checkpoint={"every_steps": 2, "keep": 9, "asynchronous": True})
    train(waiting)

    def write(folder: Path, step: int, *rest: Any) -> Path:
        deadline = time.monotonic() + 60
        while step == 2 and 3 not in events(beside, "step"):
            assert time.monotonic() < deadline, "step 3 waits for the checkpoint of step 2"
            time.sleep(0.01)
        return save_checkpoint(folder, step, *rest)

    monkeypatch.setattr(single, "save_checkpoint", write)
    train(beside)
    for step in (2, 4):
        files = [Path(config.output) / f"checkpoints/step-{step}/state.pt" for config in (waiting, beside)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert events(beside, "checkpoint") == [2, 4]


@pytest.mark.parametrize("beside", [False, True])
def test_a_checkpoint_that_fails_stops_the_run_or_is_told(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    def write(folder: Path, step: int, *rest: Any) -> Path:
        if step == 2:
            raise NotWritten(folder / "step-2", "No space left on device")
        return save_checkpoint(folder, step, *rest)

    monkeypatch.setattr(single, "save_checkpoint", write)
    section = {"every_steps": 2, "asynchronous": beside}
    strict = make_config(checkpoint=section)
    with pytest.raises(UserError, match="step-2: the checkpoint could not be written: No space left on device"):
        train(strict)
    assert 4 not in events(strict, "step")
    lenient = make_config(checkpoint={**section, "on_failure": "continue"}, output=str(tmp_path / "lenient"))
    assert train(lenient).finished
    assert events(lenient, "checkpoint_failed") == [2]
    assert events(lenient, "checkpoint") == [4]
    assert [path.name for path in checkpoints(tmp_path / "lenient/checkpoints")] == ["step-4"]
