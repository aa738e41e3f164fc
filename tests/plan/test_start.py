"""A run foresees itself, refuses what does not fit, and takes its largest batch first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.product.test_product import equal_bits, final_state, losses
from tunesmith.config import RunConfig
from tunesmith.engines.single import SingleEngine
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.plan import start
from tunesmith.plan.worst import worst_batch
from tunesmith.run import build, train
from tunesmith.run_folder import read_events

MakeConfig = Callable[..., RunConfig]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", "dropout": 0.1}},
    "chunk": {"method": {"name": "chunk", "num_chunks": 2}},
    "zeroth": {"method": {"name": "zeroth"}, "optimizer": {"name": "sgd", "lr": 1e-3}},
}


@pytest.mark.parametrize("sections", METHODS.values(), ids=METHODS.keys())
def test_nothing_is_changed_by_it(make_config: MakeConfig, tmp_path: Path, sections: dict[str, Any]) -> None:
    one, other = (
        train(make_config(**sections, train={"foresee": foresee}, output=str(tmp_path / f"{foresee}")))
        for foresee in (True, False)
    )
    assert losses(one.folder) == losses(other.folder)
    assert one.eval_losses == other.eval_losses
    assert equal_bits(final_state(one.folder), final_state(other.folder))


def test_what_was_foreseen_is_kept_and_is_what_the_largest_batch_takes(make_config: MakeConfig) -> None:
    run = train(make_config(train={"foresee": True}))
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


@pytest.mark.parametrize("where", ["rehearse", "run_loop"])
def test_out_of_memory_tells_what_was_held_and_what_would_help(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore")

    monkeypatch.setattr(f"tunesmith.run.{where}", fail)
    with pytest.raises(UserError, match=r"out of memory: CUDA(.|\n)*foreseen were(.|\n)*micro_batch_tokens"):
        train(make_config(train={"foresee": True}))


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
