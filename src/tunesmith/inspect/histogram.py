"""How long the samples are: bars in the terminal and a picture, with data.max_tokens marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.text import Text

from tunesmith.errors import UserError

BARS = " ▏▎▍▌▋▊▉█"
WIDTH = 48
"""Characters of the longest bar."""
TITLE = 90
"""Characters that fit above the picture."""
FEWEST_BINS, MOST_BINS = 8, 24


@dataclass(frozen=True)
class Histogram:
    """Counts of lengths in bins whose borders rise by a constant factor, one of them at `max_tokens`."""

    edges: tuple[int, ...]
    """Bin i holds lengths from edges[i] + 1 to edges[i + 1]."""
    counts: tuple[int, ...]
    max_tokens: int


def histogram(lengths: np.ndarray, max_tokens: int) -> Histogram:
    """Bins of half an octave, finer ones where the lengths lie close together. `lengths`: int [samples], not empty."""
    low, high = max(1, int(lengths.min())), int(lengths.max())
    edges = list(range(low - 1, high + 1))
    if len(edges) > MOST_BINS:
        edges = next((bins for steps in (2, 4) if len(bins := _edges(low, high, max_tokens, steps)) > FEWEST_BINS), [])
        edges = edges or _edges(low, high, max_tokens, 8)
    counts, _ = np.histogram(lengths, [edges[0] + 0.5, *(edge + 0.5 for edge in edges[1:])])
    return Histogram(tuple(edges), tuple(counts.tolist()), max_tokens)


def _edges(low: int, high: int, max_tokens: int, steps: int) -> list[int]:
    """Whole numbers max_tokens × 2^(n / steps), the first below `low` and the last not below `high`."""
    first = math.floor(steps * math.log2((low - 0.5) / max_tokens))
    last = math.ceil(steps * math.log2(high / max_tokens))
    return sorted({math.floor(max_tokens * 2 ** (n / steps) + 1e-6) for n in range(first, last + 1)})


def bars(shape: Histogram) -> Text:
    """A bar a bin, and a line where max_tokens cuts."""
    total, most = sum(shape.counts), max(shape.counts)
    borders = pairwise(shape.edges)
    labels = [f"{stop:,}" if stop == start + 1 else f"{start + 1:,} – {stop:,}" for start, stop in borders]
    width = max(map(len, labels))
    text = Text()
    for n, (label, count) in enumerate(zip(labels, shape.counts, strict=True)):
        if shape.edges[n] == shape.max_tokens:
            text.append(
                f"{'':>{width}} ── data.max_tokens: {shape.max_tokens:,} ".ljust(width + WIDTH, "─") + "\n", "red"
            )
        over = shape.edges[n] >= shape.max_tokens
        text.append(f"{label:>{width}} ", "dim")
        text.append(_bar(count / most), "red" if over else "green")
        text.append(f" {count:,}" if count else "")
        text.append(f"  {count / total:.1%}\n" if count else "\n", "dim")
    text.rstrip()
    return text


def _bar(share: float) -> str:
    eighths = max(1, round(share * WIDTH * 8)) if share else 0
    return BARS[-1] * (eighths // 8) + BARS[eighths % 8].strip()


def write_png(shape: Histogram, names: Sequence[str], file: Path) -> None:
    """The same as a picture. Raises UserError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    starts = [max(edge, 0.5) for edge in shape.edges[:-1]]
    widths = [stop - start for start, stop in zip(starts, shape.edges[1:], strict=True)]
    colors = ["#2171b5" if stop <= shape.max_tokens else "#d94801" for stop in shape.edges[1:]]
    axes.bar(starts, shape.counts, widths, align="edge", color=colors, edgecolor="white", linewidth=0.7)
    axes.set_xscale("log", base=2)
    axes.set_xticks([edge for edge in shape.edges if edge])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=45)
    if starts[0] <= shape.max_tokens <= shape.edges[-1]:
        axes.axvline(shape.max_tokens, color="#d94801", linewidth=1.5, label=f"data.max_tokens: {shape.max_tokens:,}")
        axes.legend()
    axes.set_xlabel("tokens of a sample, before truncation")
    axes.set_ylabel("samples")
    title = " + ".join(names)
    axes.set_title(title if len(title) <= TITLE else f"{len(names)} data sets", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    aside = file.with_name(f".{file.stem}.writing.png")
    try:
        figure.savefig(aside, dpi=120)
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{file}: could not be written: {error}") from error
