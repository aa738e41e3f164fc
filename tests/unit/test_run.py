"""What happens in a run beside the steps: signals, NaN, evaluation, levers, what is written down."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.product.test_product import equal_bits, final_state, losses
from tunesmith.config import RunConfig
from tunesmith.errors import UserError
from tunesmith.hooks import Log
from tunesmith.learner import Learner
from tunesmith.objectives.sft import Sft
from tunesmith.run import build, train
from tunesmith.run_folder import read_events

MakeConfig = Callable[..., RunConfig]


@pytest.mark.usefixtures("plain_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    undisturbed = train(make_config(train={"steps": 6}, output=str(tmp_path / "undisturbed")))
    config = make_config(train={"steps": 6})
    step = Learner.step

    def disturbed(self: Learner, *args: Any, **kwargs: Any) -> Any:
        metrics = step(self, *args, **kwargs)
        if len(losses(Path(config.output))) == 2:  # in the third step
            os.kill(os.getpid(), number)
        return metrics

    monkeypatch.setattr(Learner, "step", disturbed)
    stopped = train(config)
    monkeypatch.undo()
    assert (stopped.step, stopped.finished) == (3, False)
    assert (
        f"stopped after step 3 and saved; go on with: tunesmith train --resume {config.output}"
        in capsys.readouterr().err.replace("\n", " ").replace("  ", " ")
    )
    assert "The run has not ended" in (stopped.folder / "report.md").read_text()
    assert not (stopped.folder / "model").exists()
    left: Any = signal.getsignal(number)  # the same signal may come once more; a later one acts as it did before
    left.__self__._restore()
    assert (
        signal.getsignal(number) == {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}[number]
    )
    finished = train(config, resume=True)
    assert finished.finished
    assert equal_bits(final_state(finished.folder), final_state(undisturbed.folder))
    assert losses(finished.folder) == losses(undisturbed.folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, chat_file: Path, value: float
) -> None:
    config = make_config(train={"steps": 6}, checkpoint={"every_steps": 2})
    loss = Sft.loss

    def spoilt(self: Sft, scores: Any, batch: Any) -> Any:
        total, metrics = loss(self, scores, batch)
        folder = Path(config.output)
        return (
            total * value if folder.exists() and len(losses(folder)) == 3 and total.requires_grad else total
        ), metrics

    monkeypatch.setattr(Sft, "loss", spoilt)
    with pytest.raises(UserError) as error:
        train(config)
    message = str(error.value)
    assert message.startswith(
        f"step 4: loss is {value}; the parameters were not changed by it, and the checkpoint of step 2 is kept."
    )
    assert f"Samples of this step: {chat_file}:" in message
    assert "In a new run, lower optimizer.lr (now 0.01)" in message
    monkeypatch.undo()
    assert train(config, resume=True).finished


def test_events_hold_what_they_promise(make_config: MakeConfig) -> None:
    result = train(make_config(train={"steps": 3}, evaluate={"every_steps": 2}))
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == [
        "start",
        "eval",
        "step",
        "step",
        "eval",
        "step",
        "checkpoint",
        "eval",
        "end",
    ]
    step = events[2]
    wanted = {
        "event",
        "time",
        "step",
        "loss",
        "lr",
        "grad_norm",
        "target_tokens",
        "tokens",
        "tokens_per_s",
        "memory_bytes",
    }
    assert set(step) == wanted
    assert step["tokens"] > step["target_tokens"] > 0
    assert [event["step"] for event in events if event["event"] == "eval"] == [0, 2, 3]
    assert set(result.eval_losses) == {0, 2, 3}


def test_evaluation_does_not_change_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    section = {"method": {"name": "lora", "dropout": 0.3}, "train": {"steps": 4}}
    plain = train(make_config(**section))
    watched = train(make_config(**section, evaluate={"every_steps": 1}, output=str(tmp_path / "watched")))
    assert equal_bits(final_state(plain.folder), final_state(watched.folder))


@pytest.mark.parametrize("precision", ["bf16", "mixed"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_low_precision_learns_nearly_as_fp32_does(
    make_config: MakeConfig, tmp_path: Path, precision: str, method: str
) -> None:
    section = {"method": method, "train": {"steps": 6, "batch_size": 24}}
    exact = losses(train(make_config(**section)).folder)
    low = make_config(**section, model={"precision": precision}, output=str(tmp_path / "low"))
    assert losses(train(low).folder) == pytest.approx(exact, rel=0.03)
    dtypes = {p.dtype for p in build(low).learner.method.params.values()}
    assert dtypes == {torch.bfloat16 if (precision, method) == ("bf16", "full") else torch.float32}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_losses(make_config: MakeConfig, tmp_path: Path) -> None:
    section: dict[str, Any] = {"method": "full", "train": {"steps": 3}}
    plain = losses(train(make_config(**section)).folder)
    engine = {"compile": True, "activation_checkpointing": True}
    compiled = losses(train(make_config(**section, engine=engine, output=str(tmp_path / "compiled"))).folder)
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_tensorboard_and_report(make_config: MakeConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(make_config(train={"steps": 3}, log={"tensorboard": True}))
    board = EventAccumulator(str(result.folder / "tensorboard"))
    board.Reload()
    written = [scalar.value for scalar in board.Scalars("train/loss")]
    assert written == pytest.approx(losses(result.folder), rel=1e-6)
    report = (result.folder / "report.md").read_text()
    assert (
        f"- **held-out loss**: {result.eval_losses[0]:.4f} at step 0, {result.eval_losses[3]:.4f} at step 3" in report
    )
    assert (result.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    assert len(manifest["base_weights_hash"]) == 64
    assert read_events(result.folder / "events.jsonl")[-1]["event"] == "end"


def test_log_every(make_config: MakeConfig) -> None:
    result = train(make_config(train={"steps": 5}, log={"every_steps": 2}))
    assert [e["step"] for e in read_events(result.folder / "events.jsonl") if e["event"] == "step"] == [2, 4]
    assert Log.__doc__


def test_modules_saved_beside_bf16_adapters_train_in_fp32(make_config: MakeConfig) -> None:
    method = {"name": "lora", "modules_to_save": ["lm_head"]}
    run = build(make_config(method=method, model={"precision": "bf16"}))
    assert {p.dtype for p in run.learner.method.params.values()} == {torch.float32}
    assert any("lm_head" in name for name in run.learner.method.params)
    result = train(run.config)
    found = losses(result.folder)
    assert found[-1] < found[0]


@pytest.mark.parametrize("method", [{"init": "pissa", "dropout": 0.3}, {"modules_to_save": ["lm_head"]}])
def test_the_head_s_rule_is_found_whatever_the_method_puts_in(make_config: MakeConfig, method: dict[str, Any]) -> None:
    for precision in ("fp32", "bf16", "mixed"):
        run = build(make_config(method=method, model={"precision": precision}))
        assert run.learner.engine.head.linear is not None


def test_a_run_that_goes_on_is_not_taken_for_its_earlier_result(make_config: MakeConfig) -> None:
    from tunesmith.run_folder import RunFolder

    config = make_config(train={"steps": 2})
    folder = RunFolder(train(config).folder)
    assert folder.has_ended()
    with folder.events.open("a") as stream:  # a resume for more steps that was killed
        stream.write('{"event": "resume", "step": 2}\n')
    assert not folder.has_ended()
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    assert train(longer, resume=True).finished
    assert folder.has_ended()


def test_metrics_made_of_metrics_are_written_down(
    make_config: MakeConfig, data_of_form: Callable[[str], dict[str, Any]]
) -> None:
    """The margin of feedback is of the mean rewards of a whole step, or of all that is held out."""
    config = make_config(data=data_of_form("feedback"), objective="kto", train={"steps": 2, "micro_batch_tokens": 64})
    events = [event for event in read_events(train(config).folder / "events.jsonl") if "rewards/margin" in event]
    assert {event["event"] for event in events} == {"step", "eval"}
    for event in events:
        assert event["rewards/margin"] == pytest.approx(event["rewards/chosen"] - event["rewards/rejected"], abs=1e-6)
