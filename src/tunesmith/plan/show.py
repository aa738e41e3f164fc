"""A forecast in the terminal: a table, a bar, and what it means."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.display import header, short_bytes, short_number, short_seconds
from tunesmith.plan.forecast import ORDER, Forecast, energy_kwh

COLOURS = (
    "blue",
    "cyan",
    "magenta",
    "green",
    "yellow",
    "red",
    "bright_red",
    "bright_yellow",
    "bright_magenta",
    "bright_blue",
)
BAR = 60
"""Cells of the bar."""

WHEN = {
    "forward": "in the forward pass",
    "logits": "at the logits",
    "backward": "in the backward pass",
    "update": "in the update",
    "evaluation": "in an evaluation",
    "reference": "while the reference scores",
    "generation": "while answers are generated",
    "saving": "while it is saved",
    "": "between steps",
}
"""When the peak is."""
LEAST_MONEY = 0.01
"""Of the device's price; below it no figure is given."""


def print_forecast(forecast: Forecast, console: Console, price: float | None = None) -> None:
    """price: of an hour of the device, in any currency."""
    config, traced = forecast.config, forecast.traced
    trained = f"{short_number(traced.trained)} of {short_number(traced.parameters)} parameters train"
    header(
        console,
        f"tunesmith plan: {config.model.path} on {forecast.device.name}",
        [
            ("method", f"{config.method.name}, {config.optimizer.name}, {forecast.precision} · {trained}"),
            ("largest", f"{traced.rows} × {traced.width} tokens at once, of {forecast.steps} steps"),
        ],
    )
    console.print(f"memory at the peak, {WHEN.get(traced.phase, traced.phase)}", highlight=False)
    console.print(memory_table(forecast), bar(forecast), highlight=False)
    console.print(in_short(forecast), highlight=False, style="" if forecast.margin >= 0 else "bold red")
    phases = (f"{name or 'between steps'} {short_bytes(peak.bytes)}" for name, peak in traced.peaks.items())
    console.print("tensors at most: " + " · ".join(phases), highlight=False)
    console.print(time_in_words(forecast, price), highlight=False)


def memory_table(forecast: Forecast) -> Table:
    """What is held at the peak."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in forecast.parts.items():
        table.add_row(Text("■ ", style=_colour(forecast, name)).append(name, style="default"), short_bytes(size))
    return table


def bar(forecast: Forecast) -> Text:
    """The parts side by side, over the device's memory or what is needed, whichever is more."""
    whole = max(forecast.needed, forecast.device.memory)
    text, done = Text(), 0.0
    for name, size in forecast.parts.items():
        cells = round((done + size) / whole * BAR) - round(done / whole * BAR)
        text.append("█" * cells, style=_colour(forecast, name))
        done += size
    text.append("░" * (BAR - round(done / whole * BAR)), style="dim")
    return text


def in_short(forecast: Forecast) -> str:
    """Needed, there, and whether it fits."""
    left = f"{short_bytes(abs(forecast.margin))} {'are left' if forecast.margin >= 0 else 'are missing'}"
    needed, memory = short_bytes(forecast.needed), short_bytes(forecast.device.memory)
    return f"{forecast.verdict}: {needed} of {memory} on {forecast.device.name}, {left}"


def time_in_words(forecast: Forecast, price: float | None = None) -> str:
    """Seconds of a step, and what the run comes to."""
    if forecast.step_s is None or forecast.run_s is None:
        return "time: name a device whose speed is known, such as rtx4090, cpu or cuda"
    (fast, slow), run = forecast.step_s, forecast.run_s
    speeds = f"{short_number(forecast.tokens / slow)} to {short_number(forecast.tokens / fast)} tokens/s"
    parts = [
        f"{short_seconds(fast)} to {short_seconds(slow)} a step, {speeds}",
        f"{short_seconds(run[0])} to {short_seconds(run[1])} in all",
    ]
    if (energy := energy_kwh(forecast)) is not None:
        scale, unit = (1, "kWh") if energy[1] >= 0.1 else (1000, "Wh")
        parts.append(f"{energy[0] * scale:.2g} to {energy[1] * scale:.2g} {unit}")
    if price is not None:
        low, high = (seconds / 3600 * price for seconds in run)
        money = f"{low:.2f} to {high:.2f}" if high >= LEAST_MONEY else f"less than {LEAST_MONEY}"
        parts.append(f"{money} at {price:g} an hour")
    return "time: " + " · ".join(parts)


def _colour(forecast: Forecast, name: str) -> str:
    names = [*ORDER, "allocator", "context"]
    return COLOURS[names.index(name) % len(COLOURS)] if name in names else "white"
