"""What can be done with a model on a device, as a table that grows while it is found out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from tunesmith.display import header, short_bytes, short_number
from tunesmith.plan.devices import Device
from tunesmith.plan.show_fit import COLOURS
from tunesmith.plan.survey import ROWS, WAYS, Cell, lengths, look

NAME, COLUMN = 22, 14
"""Widths."""
MARKS = {"fits": "fits", "tight": "tight", "does not fit": "no"}


def print_survey(model: str, overrides: Sequence[str], device: Device, console: Console) -> list[Cell]:
    """Print GiB at the peak for each method, and tokens/s where the device's speed is known. Raises UserError."""
    sizes = lengths(model, overrides)
    about = [("memory", short_bytes(device.memory)), ("step", f"{ROWS} rows or more, one of them at a time")]
    header(console, f"tunesmith plan: {model} on {device.name}", about)
    console.print(_line("tokens of a row", [f"{tokens}" for tokens in sizes]), style="bold", highlight=False)
    cells: list[Cell] = []
    for way in WAYS:
        console.print(f"{way:{NAME}}", end="", highlight=False)
        row: list[Cell] = []
        for tokens in sizes:
            row.append(look(model, way, tokens, overrides, device))
            text, colour = _memory(row[-1])
            console.print(f"{text:>{COLUMN}}", style=colour, end="", highlight=False)
        console.print()
        if any(cell.forecast is not None and cell.forecast.step_s for cell in row):
            console.print(_line("  tokens/s", [_speed(cell) for cell in row]), style="dim", highlight=False)
        cells += row
    legend = "GiB at the peak. tight: fits if nothing else is on the device"
    console.print(legend, style="dim", highlight=False)
    for note in dict.fromkeys(f"{cell.way}: {cell.note}" for cell in cells if cell.note):
        console.print(escape(note), style="dim", highlight=False)
    return cells


def _line(name: str, texts: Sequence[str]) -> str:
    return f"{name:{NAME}}" + "".join(f"{text:>{COLUMN}}" for text in texts)


def _memory(cell: Cell) -> tuple[str, str]:
    """(text, colour)"""
    if cell.forecast is None:
        return "–", "dim"
    verdict = cell.forecast.verdict
    return f"{cell.forecast.needed / 2**30:.3g} {MARKS[verdict]:>5}", COLOURS[verdict]


def _speed(cell: Cell) -> str:
    """From … to."""
    if cell.forecast is None or cell.forecast.step_s is None or cell.forecast.margin < 0:
        return ""
    fast, slow = (cell.forecast.tokens / seconds for seconds in cell.forecast.step_s)
    return f"{short_number(slow)}–{short_number(fast)}"
