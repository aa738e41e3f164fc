"""A run foresees itself, refuses what does not fit, and takes its largest batch first."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.product.test_product import equal_bits, final_state, losses
from tunesmith.config import RunConfig
from tunesmith.engines.single import SingleEngine
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.plan import start
from tunesmith.plan.devices import Device
from tunesmith.plan.worst import worst_batch
from tunesmith.run import build, train
from tunesmith.run_folder import read_events

MakeConfig = Callable[..., RunConfig]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", "dropout": 0.1}},
    "chunk": {"method": {"name": "chunk", "num_chunks": 2}},
    "zeroth": {"method": {"name": "zeroth"}, "optimizer": {"name": "sgd", "lr": 1e-3}},
}


@pytest.fixture
def rehearsed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take their largest batch first, but do not foresee themselves, which takes a process of its own."""
    monkeypatch.setattr("tunesmith.run.foreseen", lambda *given: None)


@pytest.mark.usefixtures("rehearsed_alone")
@pytest.mark.parametrize("sections", METHODS.values(), ids=METHODS.keys())
def test_nothing_is_changed_by_it(make_config: MakeConfig, tmp_path: Path, sections: dict[str, Any]) -> None:
    one, other = (
        train(make_config(**sections, train={"foresee": foresee}, output=str(tmp_path / f"{foresee}")))
        for foresee in (True, False)
    )
    assert losses(one.folder) == losses(other.folder)
    assert one.eval_losses == other.eval_losses
    assert equal_bits(final_state(one.folder), final_state(other.folder))


@pytest.mark.usefixtures("rehearsed_alone")
@pytest.mark.parametrize("step", [2, 3], ids=["between turns", "within a turn"])
@pytest.mark.parametrize("state", ["keep", "reset", "8bit"])
def test_nothing_is_changed_by_it_on_resuming(make_config: MakeConfig, tmp_path: Path, state: str, step: int) -> None:
    chunk = {"name": "chunk", "num_chunks": 3, "updates_per_chunk": 2, "order": "ascending", "state": state}
    sections: dict[str, Any] = {
        "method": chunk, "model": {"precision": "bf16"}, "checkpoint": {"every_steps": 1, "keep": 9},
        "optimizer": {"name": "adamw", "lr": 1e-2},
    }  # fmt: skip

    def config(foresee: bool, folder: Path) -> RunConfig:
        return make_config(**sections, train={"steps": 6, "foresee": foresee}, output=str(folder))

    def told(folder: Path) -> list[tuple[float, float, float]]:
        steps = [event for event in read_events(folder / "events.jsonl") if event["event"] == "step"]
        return [(event["loss"], event["chunk"], event["coverage"]) for event in steps]

    whole, second = tmp_path / "whole", tmp_path / "second"
    train(config(False, whole))
    (second / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "manifest.json"):
        (second / name).write_bytes((whole / name).read_bytes())
    (whole / f"checkpoints/step-{step}").rename(second / f"checkpoints/step-{step}")
    train(config(True, second), resume=True)
    assert told(whole)[step:] == told(second)
    assert equal_bits(final_state(whole), final_state(second))


@pytest.mark.parametrize("sections", [{}, {"method": {"name": "chunk", "num_chunks": 3, "order": "descending"}}])
def test_what_was_foreseen_is_kept_and_is_what_the_largest_batch_takes(
    make_config: MakeConfig, sections: dict[str, Any]
) -> None:
    run = train(make_config(**sections, train={"foresee": True}))
    foreseen = json.loads((run.folder / "manifest.json").read_text())["foreseen"]
    (measured,) = (event for event in read_events(run.folder / "events.jsonl") if event["event"] == "memory")
    for phase in ("forward", "logits", "backward", "evaluation"):
        assert measured[phase] == pytest.approx(foreseen["peaks"][phase], rel=0.01)
    assert (run.folder / "memory.png").stat().st_size > 1000
    assert "memory.png" in (run.folder / "report.md").read_text()


def test_a_run_that_does_not_fit_stops_before_it_loads(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SingleEngine, "load", lambda *given, **named: pytest.fail("it was loaded"))
    config = make_config(train={"foresee": True, "memory": "100MiB"})
    with pytest.raises(
        UserError, match=r"train\.memory: 100 MiB are too little: the run would take .*weights(.|\n)*train\.foresee"
    ):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.usefixtures("rehearsed_alone")
def test_the_largest_batch_goes_first(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(train={"foresee": True, "steps": 3, "batch_size": 2})
    run = build(config)
    widths = [run.data(step).tokens_BT.shape[1] for step in range(3)]
    assert worst_batch(run).tokens_BT.shape[1] == max(widths) > min(widths)
    seen: list[tuple[str, int]] = []
    for name in ("rehearse", "step"):
        monkeypatch.setattr(Learner, name, _noting(getattr(Learner, name), name, seen))
    train(config)
    assert seen == [("rehearse", max(widths)), *(("step", width) for width in widths)]


def _noting(call: Any, name: str, seen: list[tuple[str, int]]) -> Any:
    def noting(self: Learner, objective: Any, batch: Any, *more: Any) -> Any:
        if type(self.engine) is SingleEngine:  # and not foreseen
            seen.append((name, batch.tokens_BT.shape[1]))
        return call(self, objective, batch, *more)

    return noting


@pytest.mark.parametrize(
    ("where", "phases"),
    [("norm", {"forward", "backward", "evaluation"}), ("score", {"forward"})],
    ids=["step", "rehearsal"],
)
def test_out_of_memory_tells_what_was_held_and_what_would_fit(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, where: str, phases: set[str]
) -> None:
    usual = getattr(SingleEngine, where)

    def failing(self: SingleEngine, *given: Any) -> Any:
        if type(self) is SingleEngine:  # and not foreseen
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore")
        return usual(self, *given)

    config = make_config(method="full", train={"foresee": True, "memory": "64GiB"})
    monkeypatch.setattr(Device, "context", 0)  # beside which a tiny model is nothing
    monkeypatch.setattr(SingleEngine, where, failing)
    console = Console(file=StringIO())
    with pytest.raises(UserError) as raised:
        train(config, console=console)
    first, measured, foreseen, *remedies = str(raised.value).splitlines()
    assert first == "out of memory: CUDA out of memory. Tried to allocate 20.00 MiB"
    assert measured.startswith("measured with the largest batch, at most: ")
    assert all(phase in measured for phase in phases)
    assert foreseen.startswith("foreseen were ")
    assert remedies[0] == "what would fit:"
    assert any("engine.activation_checkpointing=true" in line for line in remedies[1:])
    assert "CUDA out of memory. Tried to allocate 20.00 MiB\nlooking for what would fit" in console.file.getvalue()


def test_out_of_memory_of_a_run_that_was_not_foreseen(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("tunesmith.run.run_loop", fail)
    with pytest.raises(UserError, match=r"out of memory: MemoryError\n.*train.micro_batch_tokens \(now \d+\)"):
        train(make_config(train={"foresee": False}))


def no_answer(*given: Any) -> None:
    raise NotImplementedError("an operation that fake tensors do not know")


def test_foreseeing_leaves_no_trace_in_the_process_that_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    eight_bit = {"optimizer": {"name": "adamw8bit", "lr": 1e-2}, "method": "full"}
    one, other = (
        train(make_config(**eight_bit, train={"foresee": foresee}, output=str(tmp_path / f"{foresee}")))
        for foresee in (True, False)
    )
    assert losses(one.folder) == losses(other.folder)


def test_a_failing_planner_stops_no_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "known", lambda *given: None)
    monkeypatch.setattr(start, "foresee", no_answer)
    assert train(make_config(train={"foresee": True})).finished
