"""What fits in place of a run that does not: in the terminal, and as a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tunesmith.config import RunConfig
from tunesmith.config_file import dump_config
from tunesmith.display import short_bytes
from tunesmith.engines import with_engine
from tunesmith.errors import UserError
from tunesmith.plan.devices import Device
from tunesmith.plan.fit import Candidate, more_devices, remedies
from tunesmith.plan.forecast import Forecast, Verdict
from tunesmith.plan.show import in_short, time_in_words
from tunesmith.run_data import RunData, open_data
from tunesmith.run_folder import write_text

COLOURS: dict[Verdict, str] = {"fits": "green", "tight": "yellow", "does not fit": "red"}


def print_fits(config: RunConfig, device: Device, console: Console, write: Path | None = None) -> list[Candidate]:
    """Print the candidates as they are found, and write the first that fits. Raises UserError if none does, or if the file is
    there already."""
    if write is not None:
        check_free(write)
    console.print(f"[bold]tunesmith plan: what fits on {escape(_named(device))}[/]", highlight=False)
    tried: list[Candidate] = []
    data = open_data(with_engine(config))
    with console.status("") as status:
        for candidate in remedies(config, device, data):
            status.stop()
            _print(
                candidate, len([each for each in tried if each.fits]) + 1, tried[0].forecast if tried else None, console
            )
            tried.append(candidate)
            if console.is_terminal:
                status.update("looking for more")
                status.start()
    fitting = [candidate for candidate in tried if candidate.fits]
    asked = tried[0].forecast
    if asked is not None and not tried[0].fits and (line := on_more_devices(asked, data)):
        console.print(f"   {line}", highlight=False)
    if not fitting:
        raise UserError(
            f"{config.model.path}: nothing that is known makes this run fit on {_named(device)}; {_nearest(tried)}"
        )
    if write is not None:
        write_fitted(fitting[0], write)
        console.print(f"wrote {write}: tunesmith train {write}", highlight=False, markup=False)
    return tried


def on_more_devices(forecast: Forecast, data: RunData) -> str:
    """How many devices would do for what was asked for, in words; nothing where that is not known."""
    found = more_devices(forecast, data)
    return f"as it was asked for, over {found[0]} such devices: {short_bytes(found[1])} on each" if found else ""


def check_free(file: Path) -> None:
    """Raises UserError if something is there, or where it would be there is no folder."""
    if file.exists():
        raise UserError(f"--write: {file} exists; name another file")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--write: {file}: there is no folder {file.parent}; make it")


def write_fitted(candidate: Candidate, file: Path) -> None:
    """A whole configuration, as `tunesmith train` takes it in this folder: paths in it are as they were. Raises UserError."""
    assert candidate.forecast is not None
    check_free(file)
    changes = " ".join(candidate.overrides)
    about = [in_short(candidate.forecast), f"changed: {changes}" if changes else "as it was asked for"]
    write_text(file, "".join(f"# {line}\n" for line in about) + dump_config(candidate.config))


def _print(candidate: Candidate, number: int, asked: Forecast | None, console: Console) -> None:
    title = candidate.what if candidate.remedies else "as it was asked for"
    console.print(
        f"{f'{number}.' if candidate.fits and asked else '–':3}{escape(title)}",
        style="" if candidate.fits or not asked else "dim", highlight=False,
    )  # fmt: skip
    forecast = candidate.forecast
    if forecast is None:
        console.print(f"   cannot be had: {escape(candidate.note)}", style="dim", highlight=False, soft_wrap=True)
        return
    needed = f"[{COLOURS[forecast.verdict]}]{short_bytes(forecast.needed)}, {forecast.verdict}[/]"
    console.print(f"   {needed} · {_time(forecast, asked)}", highlight=False)
    if candidate.note:
        console.print(f"   {escape(candidate.note)}", highlight=False)
    if candidate.fits and candidate.overrides:
        console.print(f"   {escape(' '.join(candidate.overrides))}", style="cyan", highlight=False, soft_wrap=True)


def _time(forecast: Forecast, asked: Forecast | None) -> str:
    """Of a step and of the run; on a device of unknown speed what is computed, over what was asked for."""
    if forecast.step_s is not None or asked is None:
        return time_in_words(forecast)
    return f"{forecast.flops / asked.flops:.2f} × the arithmetic of what was asked for"


def _named(device: Device) -> str:
    size = short_bytes(device.memory)
    return size if device.rates is None else f"{device.name}, {size}"


def _nearest(tried: Iterable[Candidate]) -> str:
    """What comes nearest, in words."""
    least = min((candidate for candidate in tried if candidate.forecast is not None), key=lambda each: each.needed)
    return f"least takes {', '.join(least.remedies) or 'what was asked for'}: {short_bytes(least.needed)}"
