import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from rich.console import Console

from tests.families import SMALL
from tunesmith.config import RunConfig
from tunesmith.config_file import load_config
from tunesmith.errors import UserError
from tunesmith.methods import METHODS
from tunesmith.plan import devices, kept
from tunesmith.plan.devices import Device
from tunesmith.plan.fit import IN_TURNS, ROWS, Candidate, Harm, laid_over, nearest, overrides, remedies
from tunesmith.plan.forecast import TIGHT, Forecast, foresee
from tunesmith.plan.show_fit import print_fits
from tunesmith.run import build, train
from tunesmith.run_data import RunData, open_data
from tunesmith.run_folder import read_events

CHECKPOINTING = "activation checkpointing"
HARMS = list(get_args(Harm))
LARGE = Device("large", "cpu", 2**40)


@pytest.fixture(autouse=True)
def _no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what the interpreter takes, all else of a small model would be nothing."""
    monkeypatch.setitem(devices.CONTEXT, "cpu", 0)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A model that is large beside its adapters and a few rows of activations."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("wide")
    wide = {
        "hidden_size": 192,
        "intermediate_size": 384,
        "head_dim": 48,
        "num_hidden_layers": 3,
        "initializer_range": 0.02,
    }
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | wide)).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def full(make_config: Callable[..., RunConfig], wide_folder: Path) -> RunConfig:
    return make_config(
        model={"path": str(wide_folder)}, method={"name": "full"}, optimizer={"name": "adamw", "lr": 1e-3},
        train={"batch_size": 16, "steps": 16},
    )  # fmt: skip


@pytest.fixture
def data(full: RunConfig) -> RunData:
    return open_data(full)


def device_of(forecast: Forecast) -> Device:
    """One on which just that fits."""
    return Device("small", "cpu", int(forecast.needed / TIGHT) + 1)


def needs(config: RunConfig, data: RunData, *settings: dict[str, Any]) -> Forecast:
    """The forecast with settings laid over the configuration."""
    for tree in settings:
        config = laid_over(config, tree)
    return foresee(config, LARGE, replace(data, config=config))


def longest(data: RunData) -> int:
    return int(max(part.lengths().max() for part in (data.samples, data.held_out) if len(part)))


def rows(data: RunData, number: int) -> dict[str, Any]:
    return {"train": {"micro_batch_tokens": number * longest(data)}}


AGAIN = {"engine": {"activation_checkpointing": True}}
TURNS = {"method": {"name": "chunk", "num_chunks": 16}}
ADAPTER = {"method": {"name": "lora", "rank": 16}}


def first_that_fits(config: RunConfig, data: RunData, forecast: Forecast) -> Candidate:
    return next(found for found in remedies(config, device_of(forecast), data) if found.fits)


def test_what_fits_is_left_as_it_is(full: RunConfig, data: RunData) -> None:
    (only,) = remedies(full, device_of(needs(full, data)), data)
    assert (only.fits, only.remedies, only.overrides, only.config) == (True, (), (), full)


def test_the_update_stays_the_same_as_long_as_that_is_enough(full: RunConfig, data: RunData) -> None:
    four, one, both = (
        needs(full, data, rows(data, 4)),
        needs(full, data, rows(data, 1)),
        needs(full, data, rows(data, 1), AGAIN),
    )
    assert needs(full, data, rows(data, 8)).needed > four.needed / TIGHT > one.needed > both.needed / TIGHT
    found = first_that_fits(full, data, four)
    assert (found.remedies, found.harm) == ((ROWS,), "same result")
    assert found.overrides == (f"train.micro_batch_tokens={4 * longest(data)}",)  # and not fewer
    found = first_that_fits(full, data, both)
    assert (found.remedies, found.harm) == ((CHECKPOINTING, ROWS), "same result")
    assert set(found.overrides) == {
        "engine.activation_checkpointing=true", f"train.micro_batch_tokens={longest(data)}",
    }  # fmt: skip


def test_checkpointing_alone_keeps_the_micro_batches(full: RunConfig, data: RunData) -> None:
    alone = needs(full, data, AGAIN)
    found = [each.remedies for each in remedies(full, device_of(alone), data, wanted=2) if each.fits]
    assert found == [(ROWS,), (CHECKPOINTING,)]


def test_what_changes_little_comes_before_another_method(full: RunConfig, data: RunData) -> None:
    turns = needs(full, data, TURNS, rows(data, 1), AGAIN)
    assert turns.needed / TIGHT < needs(full, data, rows(data, 1), AGAIN).needed
    tried = list(remedies(full, device_of(turns), data, wanted=2))
    assert [each.harm for each in tried] == sorted((each.harm for each in tried), key=HARMS.index)
    least = tried[1]  # of what leaves the update as it is
    assert (least.harm, least.fits) == ("same result", False)
    found = next(each for each in tried if each.fits)
    assert (found.remedies, found.harm) == ((IN_TURNS, CHECKPOINTING, ROWS), "result differs a little")
    assert {"method=chunk", "method.num_chunks=16", "optimizer.lr=5e-05"} < set(found.overrides)


def test_eight_bit_states_where_torchao_is_installed(full: RunConfig, data: RunData) -> None:
    pytest.importorskip("torchao")
    small = needs(full, data, {"optimizer": {"name": "adamw8bit"}}, rows(data, 1))
    assert small.needed / TIGHT < needs(full, data, rows(data, 1), AGAIN).needed
    found = first_that_fits(full, data, small)
    assert found.remedies == ("optimizer state in 8 bits", ROWS)
    assert found.config.optimizer.lr == full.optimizer.lr


def test_adapters_and_scoring_come_last(full: RunConfig) -> None:
    frozen = laid_over(full, {"method": {"name": "freeze", "last_blocks": 3}})
    data = open_data(frozen)
    found = first_that_fits(frozen, data, needs(frozen, data, ADAPTER, rows(data, 1), AGAIN))
    assert (found.remedies, found.harm) == (("LoRA of rank 16", CHECKPOINTING, ROWS), "another method")
    adapter = laid_over(found.config, {"model": {"precision": "bf16"}})
    alone = {"data": {"pack": False}}
    scored = needs(adapter, data, {"method": {"name": "zeroth"}, "optimizer": {"name": "sgd"}}, rows(data, 1), alone)
    found = first_that_fits(adapter, data, scored)
    assert found.remedies[0] == "scoring alone (zeroth)"
    assert found.config.optimizer.name == "sgd"


def test_shorter_samples_are_told_of_and_the_last_resort(full: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    texts = ["And so on. " * number for number in (80, 80, 2, 2, 2, 2, 2, 2)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = laid_over(full, {
        "objective": {"name": "pretrain"}, "method": {"name": "zeroth"}, "optimizer": {"name": "sgd"},
        "data": {"path": str(file), "max_tokens": 256, "truncation": "right", "eval_fraction": 0, "pack": False},
    })  # fmt: skip
    data = open_data(config)
    assert longest(data) == 256
    shorter = foresee(laid_over(config, {"data": {"max_tokens": 128}, "train": {"micro_batch_tokens": 128}}), LARGE)
    (_, *others, last) = remedies(config, device_of(shorter))
    assert not any(each.fits for each in others)
    assert (last.harm, last.note) == ("other data", "2 of 8 samples are longer (data.truncation: right)")
    assert last.fits
    assert "data.max_tokens=128" in last.overrides


def test_what_is_refused_is_told(full: RunConfig, data: RunData) -> None:
    with pytest.raises(UserError, match="positions"):
        next(remedies(laid_over(full, {"data": {"max_tokens": 4096, "path": str(_long_file(full))}}), LARGE))


def _long_file(config: RunConfig) -> Path:
    file = Path(config.output).parent / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} And so on." * 200}) + "\n" for n in range(30)))
    return file


def test_overrides_make_the_same_of_a_short_file(full: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: demo\ndata: {path: demo, max_tokens: 512}\nmethod: full\noptimizer: {lr: 1e-4}\n")
    config = load_config(file)
    scoring = {"method": {"name": "zeroth"}, "optimizer": {"name": "sgd"}}
    rows_alone = {"data": {"pack": False}, "train": {"micro_batch_tokens": 7}}
    for changes in (AGAIN, TURNS, ADAPTER, scoring, rows_alone, {"optimizer": {"name": "adamw8bit"}}):
        after = laid_over(config, changes)
        assert load_config(file, overrides(config, after)) == after != config


def test_what_is_nearest_to_a_run_that_was_refused(full: RunConfig, data: RunData) -> None:
    device = device_of(needs(full, data, rows(data, 1)))
    found = nearest(foresee(full, device, data), data, wanted=1)
    assert [each.remedies for each in found] == [(ROWS,)]


def test_a_fitted_file_trains_within_the_budget(full: RunConfig, data: RunData, tmp_path: Path) -> None:
    device = device_of(needs(full, data, TURNS, rows(data, 1), AGAIN))
    file = tmp_path / "fitted.yaml"
    print_fits(full, device, Console(quiet=True), file)
    assert foresee(load_config(file), device).verdict == "fits"
    again = [f"train.memory={device.memory}", "train.foresee=true"]
    run = train(load_config(file, again), console=Console(quiet=True))
    assert run.finished
    (measured,) = (event for event in read_events(run.folder / "events.jsonl") if event["event"] == "memory")
    peaks = [
        size for phase, size in measured.items() if phase in ("forward", "logits", "backward", "update", "evaluation")
    ]
    assert len(peaks) >= 3
    assert max(peaks) < device.memory
    refused = laid_over(full, {"train": {"memory": device.memory, "foresee": True}})
    refused = refused.model_copy(update={"output": str(tmp_path / "another")})
    with pytest.raises(UserError, match=r"what would fit:\n  method=chunk .*method.num_chunks=16"):
        train(refused, console=Console(quiet=True))
    with pytest.raises(UserError, match="exists"):
        print_fits(full, device, Console(quiet=True), file)


def test_nothing_fits(full: RunConfig) -> None:
    with pytest.raises(UserError, match=r"nothing that is known .* least takes"):
        print_fits(full, Device("tiny", "cpu", 1000), Console(quiet=True))


def test_a_plan_is_kept_until_anything_changes(full: RunConfig, data: RunData, monkeypatch: pytest.MonkeyPatch) -> None:
    once = foresee(full, LARGE, data)
    monkeypatch.setattr(kept, "trace", lambda *given: pytest.fail("made again"))
    assert foresee(full, LARGE, data) == once
    assert foresee(laid_over(full, {"train": {"memory": 1}}), LARGE, data) == once
    shorter = replace(data, samples=data.samples.select([np.arange(len(data.samples)) > 0]))
    for changed in (replace(data, config=full.model_copy(update={"seed": 1})), shorter):
        assert kept.key(changed, "fp32", "cpu") != kept.key(data, "fp32", "cpu")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_declares_its_bytes(make_config: Callable[..., RunConfig], name: str) -> None:
    choice = {"last_blocks": 1} if name == "freeze" else {"num_chunks": 2} if name == "chunk" else {}
    optimizer = {"name": "sgd"} if name == "zeroth" else {"name": "adamw"}
    config = make_config(method={"name": name, **choice}, optimizer={**optimizer, "lr": 1e-3})
    method = build(config).learner.method
    memory = method.memory({n: (p.numel(), p.element_size()) for n, p in method.active().items()})
    assert memory.gradients_bytes + memory.optimizer_bytes > 0
