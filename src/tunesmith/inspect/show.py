"""`tunesmith data show`: the tokens of samples and batches, as the model will get them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from tunesmith.config import RunConfig
from tunesmith.data.pack import collate
from tunesmith.data.prepare import Watch, unwatched
from tunesmith.data.samples import Samples
from tunesmith.display import reading
from tunesmith.engines.single import find_device
from tunesmith.errors import UserError
from tunesmith.inspect.page import page
from tunesmith.inspect.pieces import Pieces
from tunesmith.inspect.rest import Rest
from tunesmith.inspect.terminal import show_view
from tunesmith.inspect.view import View, rows_as_json, rows_of
from tunesmith.run_data import RunData, open_data
from tunesmith.run_folder import write_text
from tunesmith.types import Batch, Place

ASSUMED = "as data.pack and the device say (train also asks the model whether it keeps packed sequences apart)"


@dataclass(frozen=True)
class Chosen:
    """A batch to look at, and the samples that its `sample_N` counts in."""

    title: str
    batch: Batch
    samples: Samples
    step: int | None = None
    """None: not a batch of the run."""


def open_packed(config: RunConfig, pack: bool | None = None, watch: Watch = unwatched) -> RunData:
    """Samples and batches of a run. `pack`: as the run is to be assumed to do it; None: as its configuration says.

    A run also asks the model whether it keeps packed sequences apart; for that it needs the weights.
    """
    data = open_data(config, watch)
    wanted = pack if pack is not None else config.data.pack
    packed = (wanted if wanted is not None else find_device(config.engine.device).type != "cpu") and data.can_pack
    return replace(data, batches=replace(data.batches, pack=packed))


def show(
    config: RunConfig,
    *,
    sample: int | None = None,
    place: str | None = None,
    batch: int | None = None,
    pack: bool | None = None,
    html: Path | None = None,
    as_json: bool = False,
    positions: bool = False,
) -> None:
    """Print a sample, the samples of a record, or a batch. Raises UserError where there is no such thing."""
    with reading(Console(stderr=True)) as watch:
        data = open_packed(config, pack, watch)
    if batch is not None:
        chosen = [_batch(data, batch)]
    else:
        chosen = [_sample(data, sample or 0)] if place is None else _place(data, place)
    pieces = Pieces(data.renderer.tokenizer)
    if as_json:
        rows = [row for one in chosen for row in rows_as_json(one.batch, pieces)]
        print(json.dumps(rows if batch is not None or len(rows) > 1 else rows[0]))
    if as_json and html is None:
        return
    view = make_view(data, chosen, pieces, assumed=pack is None)
    if html is not None:
        write_text(html, page(view, positions))
    if not as_json:
        show_view(Console(), view, positions)


def _batch(data: RunData, step: int) -> Chosen:
    if not 0 <= step < data.steps:
        raise UserError(f"--batch {step}: the run has {data.steps} batches; give 0 to {data.steps - 1}")
    batch, batches = data.batches(step), data.batches
    samples, _ = batches.at(step)
    return Chosen(f"batch {step} of {data.steps} · {len(set(batch.group_N.tolist()))} samples", batch, samples, step)


def _sample(data: RunData, index: int) -> Chosen:
    if data.config.data.stream:
        raise UserError("--sample: with data.stream the samples have no numbers; use --batch")
    if not 0 <= index < len(data.samples):
        raise UserError(
            f"--sample {index}: there are {len(data.samples)} training samples; give 0 to {len(data.samples) - 1}"
        )
    return _alone(data, data.samples, index, f"sample {index} of {len(data.samples)} training samples")


def _place(data: RunData, text: str) -> list[Chosen]:
    """The samples of a record, be it trained on or held out."""
    if data.config.data.stream:
        raise UserError("--place: with data.stream the samples cannot be searched; use --batch")
    name, _, line = text.rpartition(":")
    if not name or not line.isdecimal():
        raise UserError(f"--place {text}: expected FILE:LINE, such as train.jsonl:17")
    for samples, what in ((data.samples, "training"), (data.held_out, "held-out")):
        if found := _find(samples, name, int(line)):
            return [_alone(data, samples, n, f"sample {n} of {len(samples)} {what} samples") for n in found]
    raise UserError(f"--place {text}: no sample comes from there; tunesmith data check tells what is left out, and why")


def _find(samples: Samples, name: str, line: int) -> list[int]:
    found: list[int] = []
    start = 0
    for part, chosen in zip(samples.parts, samples.chosen, strict=True):
        files = [n for n, file in enumerate(part.files) if name == file or _same_file(name, file)]
        here = np.isin(part.file[chosen], files) & (part.line[chosen] == line)
        found += (start + np.flatnonzero(here)).tolist()
        start += len(chosen)
    return found


def _same_file(one: str, other: str) -> bool:
    return "://" not in other and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _alone(data: RunData, samples: Samples, index: int, title: str) -> Chosen:
    """One sample in one row; a preference pair shares it."""
    return Chosen(title, collate(samples, [index], data.config.data.max_tokens, pack=True), samples)


def make_view(data: RunData, chosen: list[Chosen], pieces: Pieces, assumed: bool = True) -> View:
    """What is to be seen. `assumed`: how rows are filled was not asked for, but taken from the configuration."""
    config = data.config.data
    rest = Rest(config, data.renderer)
    rest.read({place for one in chosen for place in _maybe_cut(one, config.max_tokens, config.truncation == "split")})
    rows = [row for one in chosen for row in rows_of(one.batch, one.samples, pieces, rest)]
    facts = [data.config.data.shown()]
    if (step := chosen[0].step) is not None:
        rows_hold = f"rows of at most {config.max_tokens:,} tokens" if data.batches.pack else "one sequence a row"
        facts.append(f"{rows_hold}, " + (ASSUMED if assumed else "as asked for"))
        facts.append(f"batches count from 0: the log calls this one step {step + 1}")
    title = chosen[0].title if len(chosen) == 1 else f"{len(chosen)} samples of one record"
    return View(title, facts, [replace(row, number=n) for n, row in enumerate(rows)], config.truncation == "split")


def _maybe_cut(chosen: Chosen, max_tokens: int, split: bool) -> list[Place]:
    """Of the records behind a batch those whose samples are as long as a cut one is."""
    lengths = np.bincount(chosen.batch.sequence_BT[chosen.batch.sequence_BT >= 0].numpy())
    samples = chosen.batch.sample_N.tolist()
    return [
        chosen.samples.place(n) for n, length in zip(samples, lengths, strict=True) if split or length >= max_tokens
    ]
