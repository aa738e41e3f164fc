"""How the findings of `data check` look in the terminal."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.inspect.histogram import bars, histogram
from tunesmith.inspect.tally import Tally, together
from tunesmith.inspect.words import scripts

if TYPE_CHECKING:
    from tunesmith.inspect.check import Findings
    from tunesmith.objectives.base import Form

SCRIPTS, LEAST_SHARE = 5, 0.005
"""So many scripts are named, if they have this share of some data set; the rest is `other`."""
CLASSES = 10
"""So many classes are counted out."""
COLUMN, NAME = 10, 20
"""Characters of a column at least, with the space beside it; and of a data set's name at most."""


def show_findings(console: Console, findings: Findings, quarantine: Path | None, png: Path | None) -> None:
    """Errors, table, histogram, overlap and notes; and last what to do next."""
    _errors(console, findings)
    _tables(console, findings.tallies)
    _lengths(console, findings)
    _overlap(console, findings)
    for tally in findings.tallies:
        if said := _labels(tally, findings.form):
            _say(console, f"{tally.name}: {said}")
        if tally.counts.first_cut:
            first = f"{tally.name}: the first sample that is truncated or dropped: {tally.counts.first_cut}"
            _say(console, Text.assemble(("note: ", "bold"), first))
        for note, number in tally.counts.notes.items():
            _say(console, Text.assemble(("note: ", "bold"), f"{tally.name}: {number:,} {note}"))
    for file, what in ((quarantine, "bad records"), (png, "histogram")):
        if file is not None:
            _say(console, f"{what}: {file}")
    _say(console, Text.assemble(("next: ", "bold"), next_step(findings, quarantine)))


def _say(console: Console, text: str | Text) -> None:
    """A line that the terminal wraps, so that it can be copied and searched as one."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _errors(console: Console, findings: Findings) -> None:
    errors = findings.errors
    for error in errors.shown:
        place, _, rest = str(error).partition(": ")
        _say(console, Text.assemble((place, "red"), ": " + rest))
    if errors.number > len(errors.shown):
        _say(console, f"… and {errors.number - len(errors.shown):,} more (--limit shows more)")
    if errors.number:
        console.print()


Row = tuple[str, str, Callable[[Tally], str]]
"""Group, name, and what stands in a data set's column."""


def _rows(tallies: list[Tally]) -> list[Row]:
    rows: list[Row] = [
        ("records", "read", lambda t: _count(t.rows)),
        ("", "bad", lambda t: _count(t.bad)),
        ("", "with role errors", lambda t: _count(t.role_errors)),
        ("", "exact duplicates", lambda t: _count(_duplicates(t))),
        ("samples", "to learn from", lambda t: _count(t.samples)),
        ("", "truncated", lambda t: _count(t.counts.truncated)),
        ("", "dropped", lambda t: _count(t.counts.dropped)),
        ("tokens", "before truncation", lambda t: _count(sum(t.lengths))),
        ("", "to train on", lambda t: _count(t.tokens)),
        ("", "supervised", lambda t: f"{t.learnt / t.tokens:.1%}" if t.tokens else "–"),
        ("length", "minimum", lambda t: _quantile(t.lengths, 0)),
        ("", "median", lambda t: _quantile(t.lengths, 50)),
        ("", "90th percentile", lambda t: _quantile(t.lengths, 90)),
        ("", "95th percentile", lambda t: _quantile(t.lengths, 95)),
        ("", "99th percentile", lambda t: _quantile(t.lengths, 99)),
        ("", "maximum", lambda t: _quantile(t.lengths, 100)),
    ]
    if any(tally.turns for tally in tallies):
        rows += [
            ("turns", "median", lambda t: _quantile(t.turns, 50)),
            ("", "maximum", lambda t: _quantile(t.turns, 100)),
            ("", "empty", lambda t: _count(t.empty_turns)),
        ]
    return rows + _script_rows(tallies)


def _script_rows(tallies: list[Tally]) -> list[Row]:
    """The commonest scripts of any data set; the rest as `other`."""
    shares = {}
    for tally in tallies:
        counts = scripts(tally.code_points)
        shares[id(tally)] = {name: number / counts.total() for name, number in counts.items()}
    most: Counter[str] = Counter()
    for found in shares.values():
        most |= Counter(found)
    named = [name for name, share in most.most_common(SCRIPTS) if share >= LEAST_SHARE]

    def cell(names: Collection[str]) -> Callable[[Tally], str]:
        def share(tally: Tally) -> str:
            part = sum(share for name, share in shares[id(tally)].items() if name in names)
            return "–" if not part else f"{part:.1%}" if part >= 0.0005 else "< 0.1%"

        return share

    rest = set(most) - set(named)
    columns = [(name, cell([name])) for name in named] + ([("other", cell(rest))] if rest else [])
    return [("" if n else "scripts", name, share) for n, (name, share) in enumerate(columns)]


def _tables(console: Console, tallies: list[Tally]) -> None:
    """One table, or several where the data sets do not fit beside each other."""
    columns = [*tallies, together(tallies)] if len(tallies) > 1 else tallies
    rows = _rows(columns)
    names = [_short(tally.name) + "\nheld out" * tally.held_out for tally in columns]
    widths = [max(COLUMN, max(map(len, name.split("\n"))) + 2) for name in names]
    left = max(len(group) for group, _, _ in rows) + max(len(name) for _, name, _ in rows) + 4
    start = 0
    while start < len(columns):
        stop = start + 1
        while stop < len(columns) and left + sum(widths[start : stop + 1]) <= console.width:
            stop += 1
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
        table.add_column(style="bold cyan")
        table.add_column(style="cyan")
        for name in names[start:stop]:
            table.add_column(Text(name), justify="right", no_wrap=True)
        for group, name, cell in rows:
            table.add_row(group, name, *(cell(tally) for tally in columns[start:stop]))
        console.print(table, highlight=False)
        console.print()
        start = stop


def _short(name: str) -> str:
    """The end of a long path, which tells more than its beginning."""
    return name if len(name) <= NAME else "…" + name[1 - NAME :]


def _lengths(console: Console, findings: Findings) -> None:
    lengths = _all_lengths(findings)
    if not len(lengths):
        return
    max_tokens = findings.config.data.max_tokens
    fits = "" if lengths.max() > max_tokens else f", all within data.max_tokens: {max_tokens:,}"
    _say(console, Text(f"Length of the samples in tokens, before truncation{fits}", "bold"))
    _say(console, bars(histogram(lengths, max_tokens)))
    console.print()


def _all_lengths(findings: Findings) -> np.ndarray:
    return np.concatenate([np.frombuffer(tally.lengths, np.int32) for tally in findings.tallies])


def _overlap(console: Console, findings: Findings) -> None:
    data, rows = findings.config.data, sum(tally.counts.records for tally in findings.tallies)
    if not findings.held_out:
        return
    whence = f"of {rows:,} records, by data.eval_fraction: {data.eval_fraction}"
    if any(tally.held_out for tally in findings.tallies):
        whence = "records of data.eval_path" if data.eval_path else "records"
    _say(console, Text.assemble(("Held out: ", "bold"), f"{findings.held_out:,} {whence}"))
    for what, found in (
        ("whose prompt is also trained on", findings.prompts),
        ("that are nearly the same as one that is trained on", findings.near),
    ):
        _say(console, Text(f"  {found.number:,} {what}", "yellow" if found.number else ""))
        for held_out, train, similarity in found.first:
            alike = f" ({similarity:.0%} of the 5-word sequences are the same)" if found is findings.near else ""
            _say(console, Text(f"    {held_out} ~ {train}{alike}", "dim"))
        if found.number > len(found.first):
            _say(console, Text(f"    … and {found.number - len(found.first):,} more", "dim"))
    console.print()


def next_step(findings: Findings, quarantine: Path | None) -> str:
    """The most useful thing to do now."""
    data, errors = findings.config.data, findings.errors
    counts, lengths = together(findings.tallies).counts, _all_lengths(findings)
    if errors.bad and data.bad_records == "skip":
        return f"train, without {_records(len(errors.bad))} (data.bad_records: skip), or mend them"
    if errors.bad:
        copied = f" (copied to {quarantine})" if quarantine else ""
        return f"mend {_records(len(errors.bad))}{copied}, or leave them out with data.bad_records=skip"
    if errors.number:
        return "mend what is named above"
    if (counts.truncated or counts.dropped) and data.truncation != "split" and lengths.max() > data.max_tokens:
        most = int(np.percentile(lengths, 99, method="inverted_cdf"))
        return f"data.max_tokens={lengths.max()} would cut nothing; 99 % of the samples have {most} tokens or fewer"
    if findings.prompts.number or findings.near.number:
        return "the held-out loss will flatter: take the records that both sides share out of one of them"
    return "nothing to mend; see what the model will get with tunesmith data show, or start with tunesmith train"


def _labels(tally: Tally, form: Form) -> str:
    """How often the data says what of its samples, in a line."""
    if form == "feedback":
        return f"{tally.labels[1.0]:,} answers marked as desirable, {tally.labels[0.0]:,} as undesirable"
    if form == "choices":
        of_class = sorted(tally.labels.items())
        most = ", ".join(f"{int(label)}: {number:,}" for label, number in of_class[:CLASSES])
        return f"samples of class {most}" + (f" and {len(of_class) - CLASSES} more classes" * (len(of_class) > CLASSES))
    if form == "pairs" and (given := tally.samples - tally.labels[0.0]):
        return f"{given:,} of {tally.samples:,} pairs with a margin"
    return ""


def _records(number: int) -> str:
    return "the bad record" if number == 1 else f"the {number:,} bad records"


def _count(number: int) -> str:
    return f"{number:,}"


def _duplicates(tally: Tally) -> int:
    """Examples that are there already, whatever their line and file."""
    return len(tally.content) - len(np.unique(np.frombuffer(tally.content, np.uint64)))


def _quantile(values: array[int], percent: int) -> str:
    """The least value that so many percent do not exceed; the smallest for 0."""
    if not values:
        return "–"
    numbers = np.frombuffer(values, np.int32)
    return _count(int(np.percentile(numbers, percent, method="inverted_cdf")))
