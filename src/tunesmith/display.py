"""What one sees in the terminal: a header, the progress of the run, and lines between. Plain lines where it is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

PLAIN_LINE_EVERY_S = 5.0


def header(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A two-column table above the run."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    console.print(table, highlight=False)


def short_number(number: float) -> str:
    """1234567 → 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            return f"{number / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{number:.0f}"


def short_seconds(seconds: float) -> str:
    """0.25 → 250 ms, 5400 → 90 min."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def short_bytes(number: float) -> str:
    """Bytes in binary units: 1536 → 1.5 KiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**power:
            return f"{number / 2**power:.{3 if number < 1000 * 2**power else 4}g} {unit}"
    return f"{number:.0f} B"


@contextmanager
def reading(console: Console) -> Iterator[Callable[[str, int], None]]:
    """A line that tells how many records of which data set are read, where that takes longer than a moment."""
    start = perf_counter()
    with console.status("") as status:
        if not console.is_terminal:
            status.stop()

        def watch(name: str, records: int) -> None:
            speed = short_number(records / max(perf_counter() - start, 1e-3))
            status.update(f"reading {name}: {records} records, {speed}/s")

        yield watch


class Progress:
    """The line that moves: step, loss, tokens/s, memory, elapsed and remaining time."""

    def __init__(self, console: Console, steps: int, start: int, shows: Sequence[str] = ()) -> None:
        """`shows`: metrics that stand beside the loss."""
        self.console, self.steps, self.shows = console, steps, shows
        self.last_line = 0.0
        self.bar = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=steps, completed=start)

    def step(self, step: int, event: Mapping[str, Any]) -> None:
        """Show a step event."""
        shown = "".join(f"{name} {event[name]:.3f}  " for name in self.shows if name in event)
        facts = (
            f"loss {event['loss']:.4f}  {shown}{short_number(event['tokens_per_s'])} tokens/s  "
            f"{short_bytes(event['memory_bytes'])}"
        )
        self.bar.update(self.task, completed=step, description=facts)
        now = perf_counter()
        if not self.console.is_terminal and (now - self.last_line >= PLAIN_LINE_EVERY_S or step == self.steps):
            self.last_line = now
            self.console.print(f"step {step}/{self.steps}  {facts}", highlight=False)

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False, markup=False)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
