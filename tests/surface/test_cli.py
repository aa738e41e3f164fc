import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.config import RunConfig
from tunesmith.config_file import dump_config, json_schema, load_config
from tunesmith.errors import UserError
from tunesmith.run import Result
from tunesmith.run_folder import RunFolder

RUN = "model: demo\ndata: demo\noutput: runs/a\nmethod: lora\n"


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)


def output(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return str(caught.value)


def test_config_schema_prints_the_schema() -> None:
    assert json.loads(output("config", "schema")) == json.loads(json_schema())


def test_config_show_prints_the_resolved_configuration() -> None:
    shown = output("config", "show", "run.yaml")
    assert shown == dump_config(load_config("run.yaml"))
    Path("again.yaml").write_text(shown)
    assert load_config("again.yaml") == load_config("run.yaml")


def test_config_show_takes_overrides() -> None:
    overrides = ["method.rank=4", "optimizer=sgd", "train.max_grad_norm=null"]
    assert output("config", "show", "run.yaml", *overrides) == dump_config(load_config("run.yaml", overrides))
    assert load_config("run.yaml", overrides).method.rank == 4


def test_mistakes_are_user_errors() -> None:
    assert refusal("config", "show", "run.yaml", "method.rnk=4") == (
        "override method.rnk=4: method.rnk: unknown; did you mean rank?"
    )
    assert refusal("train", "no.yaml") == (
        "no.yaml: no such file; write a run.yaml with model, data and output (see examples/)"
    )
    assert refusal("train", "--resume", "runs/a") == (
        "runs/a: holds no run (no config.yaml); give the output folder of a run"
    )
    for arguments in ((), ("seed=1",)):
        assert refusal("train", *arguments) == ("give a configuration: tunesmith train run.yaml (or --resume FOLDER)")


def test_a_user_error_is_printed_without_a_traceback_and_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "config", "show", "run.yaml", "sed=1", "model=5"],
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: override model=5: model: expected settings of its own (key: value), got 5\n"
        "override sed=1: sed: unknown; did you mean seed?\n"
    )


def test_wrong_usage_exits_with_2() -> None:
    for arguments in (
        ["config", "show"],
        ["nonsense"],
        ["train", "--no-such-option"],
        ["chat", "x", "--temperature=-1"],
    ):
        assert CliRunner().invoke(app, arguments).exit_code == 2


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "tunesmith")
def test_help_mentions_every_command_and_option(path: tuple[str, ...]) -> None:
    command, text = COMMANDS[path], output(*path, "--help")
    assert command.help is None or command.help.split()[0] in text
    assert all(f"  {name} " in text for name in getattr(command, "commands", {}))
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("-")]
    assert all(name in text for name in options)


def test_the_commands() -> None:
    expected = {"train", "chat", "generate", "demo", "config", "config schema", "config show"}
    assert expected <= {" ".join(path) for path in COMMANDS}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, bool]]:
    """Calls of `tunesmith.run.train`, which does nothing."""
    calls: list[tuple[RunConfig, bool]] = []

    def record(config: RunConfig, resume: bool = False) -> Result:
        calls.append((config, resume))
        return Result(Path(config.output), step=1, finished=True, eval_losses={})

    monkeypatch.setattr("tunesmith.run.train", record)
    return calls


def test_a_run_that_a_signal_stopped_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Result(Path("runs/a"), step=1, finished=False, eval_losses={})
    monkeypatch.setattr("tunesmith.run.train", lambda config, resume=False: stopped)
    assert CliRunner().invoke(app, ["train", "run.yaml"]).exit_code == 130


def test_train_takes_a_file_and_overrides(trained: list[tuple[RunConfig, bool]]) -> None:
    output("train", "run.yaml", "method.rank=4", "seed=3")
    assert trained == [(load_config("run.yaml", ["method.rank=4", "seed=3"]), False)]


def test_resume_takes_the_configuration_of_the_run_and_overrides(trained: list[tuple[RunConfig, bool]]) -> None:
    RunFolder(Path("runs/a")).claim(load_config("run.yaml", ["method.rank=4"]))
    output("train", "--resume", "runs/a")
    output("train", "--resume", "runs/a", "train.steps=9")
    rank_4 = load_config("run.yaml", ["method.rank=4"])
    assert trained == [(rank_4, True), (load_config("run.yaml", ["method.rank=4", "train.steps=9"]), True)]


def test_resume_goes_on_in_a_folder_that_was_moved(trained: list[tuple[RunConfig, bool]]) -> None:
    RunFolder(Path("runs/a")).claim(load_config("run.yaml"))
    Path("runs").rename("moved")
    output("train", "--resume", "moved/a")
    assert trained == [(load_config("run.yaml", ["output=moved/a"]), True)]


def test_generate_refuses_an_existing_output() -> None:
    Path("answers.jsonl").write_text("mine\n")
    Path("prompts.jsonl").write_text('{"text": "x"}\n')
    message = "answers.jsonl: exists already; choose another file"
    assert refusal("generate", "demo", "prompts.jsonl", "-o", "answers.jsonl") == message
    assert refusal("generate", "demo", "prompts.jsonl", "--output", "answers.jsonl") == message
    assert Path("answers.jsonl").read_text() == "mine\n"


def test_generate_names_a_bad_record_before_it_loads_the_model() -> None:
    Path("prompts.jsonl").write_text('{"text": "x"}\n{"text": 5}\n')
    assert refusal("generate", "./no-model", "prompts.jsonl", "-o", "answers.jsonl") == (
        "prompts.jsonl:2:10 text: expected text, found int: write it as a string"
    )
    assert not Path("answers.jsonl").exists()
