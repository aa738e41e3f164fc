"""`tunesmith data check`: read all data as a run would, count it, and name every record that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from tunesmith.config import DataConfig, RunConfig
from tunesmith.data.encode import Encoder, FastDisagrees
from tunesmith.data.examples import read_examples
from tunesmith.data.forms import one_label
from tunesmith.data.prepare import Watch, eval_sources, held_out_below, make_samples, training_sources, unwatched
from tunesmith.data.sources import Source
from tunesmith.display import reading
from tunesmith.errors import UserError
from tunesmith.inspect.bad_records import Errors, write_quarantine
from tunesmith.inspect.histogram import histogram, write_png
from tunesmith.inspect.overlap import Pair, near_duplicates, same_prompts
from tunesmith.inspect.tally import Tally, together
from tunesmith.run_data import build_renderer
from tunesmith.types import Place

if TYPE_CHECKING:
    from tunesmith.data.render import Renderer
    from tunesmith.objectives.base import Form

PAIRS = 3
"""So many pairs of a held-out and a training record are named."""


@dataclass(frozen=True)
class Overlap:
    """Held-out records that are alike to one that is trained on."""

    number: int
    first: list[tuple[Place, Place, float]]
    """The likest: held-out record, training record, similarity."""


@dataclass(frozen=True)
class Findings:
    """All that `check` knows at its end."""

    config: RunConfig
    tallies: list[Tally]
    errors: Errors
    held_out: int
    """Records that are held out."""
    prompts: Overlap
    """Held-out records whose prompt is also trained on."""
    near: Overlap
    """Held-out records that are much like one that is trained on."""
    form: Form = "answers"
    """What the objective's samples are."""


def check(config: RunConfig, limit: int = 50, quarantine: Path | None = None, png: Path | None = None) -> Findings:
    """Read everything, print what is found, and write the files asked for. Raises UserError if it cannot even begin."""
    from tunesmith.inspect.table import show_findings

    if quarantine is not None and quarantine.exists():
        raise UserError(f"{quarantine}: exists already; choose another file for the bad records")
    with reading(Console(stderr=True)) as watch:
        findings, sources = examine(config, Errors(limit, keep_reasons=quarantine is not None), watch)
    kept_aside = write_quarantine(quarantine, sources, findings.errors.bad) if quarantine is not None else 0
    lengths = np.concatenate([np.frombuffer(tally.lengths, np.int32) for tally in findings.tallies])
    if png is not None and len(lengths):
        write_png(histogram(lengths, config.data.max_tokens), [tally.name for tally in findings.tallies], png)
    console = Console(width=None if Console().is_terminal else 120)
    show_findings(console, findings, quarantine if kept_aside else None, png if len(lengths) else None)
    return findings


def examine(config: RunConfig, errors: Errors, watch: Watch = unwatched) -> tuple[Findings, list[Source]]:
    """Read all data sets as a run with this configuration would, but for the weights."""
    training = training_sources(config.data)
    held_out = eval_sources(config.data)
    config, renderer = build_renderer(config)
    compare = bool(held_out) or config.data.eval_fraction > 0
    tallies = []
    for n, source in enumerate([*training, *held_out]):
        for fast in (True, False):
            before = errors.number, dict(errors.bad), list(errors.shown)
            tally = Tally(source.name, held_out=n >= len(training), compare=compare)
            try:
                _read(source, config.data, renderer, tally, errors, fast, watch)
            except FastDisagrees:
                errors.number, errors.bad, errors.shown = before
                continue
            break
        errors.sort(before[0])
        if not tally.samples and errors.number == before[0]:
            errors.add(_nothing_left(tally), tally)
        tallies.append(tally)
    _check_labels(config.data, tallies, renderer.form, errors)
    return replace(_compare(config, tallies, errors), form=renderer.form), [*training, *held_out]


def _read(
    source: Source, config: DataConfig, renderer: Renderer, tally: Tally, errors: Errors, fast: bool, watch: Watch
) -> None:
    """Read one data set. What is wrong goes to `errors`, all else to `tally`."""

    def unread(error: UserError, raw: str | None = None) -> None:
        tally.unread += errors.add(error, tally)

    def unusable(error: UserError, raw: str | None = None) -> None:
        errors.add(error, tally)

    renderer.reset()
    encoder = Encoder(renderer.tokenizer, fast)
    examples = tally.watch(read_examples(source, config.as_chat, unread))
    try:
        for chunk in make_samples(examples, config, renderer, encoder, tally.counts, unusable, tally.measure):
            tally.add_samples(chunk)
            watch(source.name, tally.rows)
    except UserError as error:  # the file itself is broken: nothing more comes of it, but the others are still read
        unread(error)
    tally.counts.notes |= renderer.notes


def _check_labels(config: DataConfig, tallies: list[Tally], form: Form, errors: Errors) -> None:
    """Note an error where all training data says the same. Multiple choice has other words in each record, and may."""
    if form == "choices" and not all(part.labels for part in config.all_sets()):
        return
    training = [tally for tally in tallies if not tally.held_out]
    found = together(training)
    labels = dict.fromkeys(found.signs - {0.0}, 0) if form == "steps" else found.labels
    if len(labels) == 1:
        ((label, number),) = labels.items()
        if error := one_label(form, label, number, config):
            errors.add(error, training[0])


def _nothing_left(tally: Tally) -> UserError:
    dropped = tally.counts.dropped
    why = f", {dropped} of them too long: raise data.max_tokens" if dropped else ": give other data"
    return UserError(f"{tally.name}: nothing to learn from in {tally.rows} records{why}")


@dataclass(frozen=True)
class _Side:
    """The records that are held out, or those that are trained on: of each data set those whose flag is true."""

    tallies: list[Tally]
    flags: list[np.ndarray]

    def prompts(self) -> np.ndarray:
        parts = zip(self.tallies, self.flags, strict=True)
        return np.concatenate([np.frombuffer(tally.prompts, np.uint64)[flags] for tally, flags in parts])

    def signatures(self) -> np.ndarray:
        parts = [tally.signatures_of(flags) for tally, flags in zip(self.tallies, self.flags, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def place(self, record: int) -> Place:
        for tally, flags in zip(self.tallies, self.flags, strict=True):
            number = int(flags.sum())
            if record < number:
                return tally.place(int(np.flatnonzero(flags)[record]))
            record -= number
        raise IndexError(record)


def _compare(config: RunConfig, tallies: list[Tally], errors: Errors) -> Findings:
    """Find what held-out and training data share."""
    limit = held_out_below(config.data)
    apart = any(tally.held_out for tally in tallies)
    flags = []
    for tally in tallies:
        content = np.frombuffer(tally.content, np.uint64)
        flags.append(np.full(len(content), tally.held_out) if apart else content < limit)
    held_out, train = _Side(tallies, flags), _Side(tallies, [~held for held in flags])
    found = (
        same_prompts(held_out.prompts(), train.prompts()),
        near_duplicates(held_out.signatures(), train.signatures()),
    )
    prompts, near = (
        Overlap(
            len(pairs),
            [(held_out.place(p.held_out), train.place(p.train), p.similarity) for p in _likest(pairs)],
        )
        for pairs in found
    )
    return Findings(config, tallies, errors, sum(int(held.sum()) for held in flags), prompts, near)


def _likest(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: -pair.similarity)[:PAIRS]
