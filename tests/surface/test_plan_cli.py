"""`tunesmith plan` with a configuration that may not fit, and with a model alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.config import RunConfig
from tunesmith.config_file import dump_config, load_config
from tunesmith.errors import UserError


def output(*arguments: str) -> str:
    return CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False).stdout


@pytest.fixture
def run_file(make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(dump_config(make_config(method={"name": "full"})))
    return Path("run.yaml")


def test_a_fitted_file_is_written_once(run_file: Path) -> None:
    shown = output("run.yaml", "--device", "rtx4090", "--fit", "--write", "fitted.yaml")
    assert "as it was asked for" in shown
    assert "wrote fitted.yaml: tunesmith train fitted.yaml" in shown
    assert load_config("fitted.yaml") == load_config("run.yaml")
    assert Path("fitted.yaml").read_text().startswith("# fits: ")
    before = Path("fitted.yaml").read_bytes()
    with pytest.raises(UserError, match=r"--write: fitted\.yaml exists"):
        output("run.yaml", "--fit", "--write", "fitted.yaml")
    with pytest.raises(UserError, match="there is no folder nowhere"):
        output("run.yaml", "--fit", "--write", "nowhere/fitted.yaml")
    assert Path("fitted.yaml").read_bytes() == before


def test_the_configurations_own_limit_counts(run_file: Path) -> None:
    with pytest.raises(UserError, match="nothing that is known makes this run fit on rtx4090, 100 MiB"):
        output("run.yaml", "train.memory=100MiB", "--device", "rtx4090", "--fit")


def test_a_file_is_written_by_fit_alone(run_file: Path) -> None:
    with pytest.raises(UserError, match="--write: writes what --fit finds"):
        output("run.yaml", "--write", "fitted.yaml")


def test_devices_that_are_not_known_are_named(run_file: Path) -> None:
    for target in ("run.yaml", "demo"):
        with pytest.raises(
            UserError, match=r"'rtx4900' is not known: give its memory, such as 24GiB, or cpu, cuda, rtx3060, .*h100"
        ):
            output(target, "--device", "rtx4900")


def test_a_model_in_place_of_a_file(model_folder: Callable[[str], Path]) -> None:
    shown = output(str(model_folder("llama")), "--device", "24GiB")
    assert "tokens of a row" in shown
    assert "zeroth" in shown
    assert "tokens/s" not in shown  # of a device of which only the memory is known


def test_several_files_one_after_the_other(run_file: Path) -> None:
    Path("other.yaml").write_text(run_file.read_text())
    shown = output("run.yaml", "other.yaml", "method=lora", "--device", "rtx4090")
    first, second = shown.split("\nother.yaml\n")
    assert first.startswith("run.yaml\n")
    assert "method   lora" in first
    assert first.removeprefix("run.yaml\n").strip() == second.strip()
    with pytest.raises(UserError, match="--write: writes one configuration, but 2 are given"):
        output("run.yaml", "other.yaml", "--fit", "--write", "fitted.yaml")
    with pytest.raises(UserError, match=r"demo: give a model alone, or configurations, .* got run\.yaml beside it"):
        output("demo", "run.yaml")
