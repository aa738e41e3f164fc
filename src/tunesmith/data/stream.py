"""Training on a stream: records are tokenized in windows while training, for data larger than the disk, or to start at once.

The order is as fixed as that of a Dataset: windows follow each other as the records do, and inside a window the samples
are shuffled by a permutation that depends on the seed and the window alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tunesmith.cache import cache_folder
from tunesmith.config import DataConfig, RunConfig
from tunesmith.data.encode import Encoder
from tunesmith.data.examples import read_examples
from tunesmith.data.order import permute
from tunesmith.data.pack import collate
from tunesmith.data.prepare import (
    eval_sources,
    file_content,
    first_by_content,
    held_out_side,
    load_sources,
    make_samples,
    reporter,
    training_sources,
)
from tunesmith.data.render import Renderer
from tunesmith.data.samples import Counts, Part, PartWriter, Samples, whole
from tunesmith.data.sources import Source
from tunesmith.errors import UserError
from tunesmith.run_folder import write_text
from tunesmith.types import Batch, Example

EMPTY_WINDOWS = 100
"""After so many in a row without a sample the stream is given up."""


@dataclass
class Windows:
    """The stream's samples, window by window."""

    config: DataConfig
    renderer: Renderer
    sources: list[Source]
    _kept: dict[int, Samples] = field(default_factory=dict)
    _reader: Iterator[Example | None] | None = None
    _next: int = 0
    """The window that the reader stands before."""
    _ahead: tuple[int, Future[Samples]] | None = None
    keep: int = 3
    """Windows that stay in reach."""
    _unread: Counts = field(default_factory=Counts)
    """Records that could not be read since the last window."""
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenize"))

    def __call__(self, window: int) -> Samples:
        """All samples of a window, held-out ones included. The next one is made in the background."""
        if window not in self._kept and self._ahead is not None:
            number, made = self._ahead
            self._kept[number], self._ahead = made.result(), None
        if window not in self._kept:
            self._kept[window] = self._make(window)
        for old in sorted(self._kept, key=lambda kept: kept == window)[: -self.keep]:
            del self._kept[old]
        if self._ahead is None and window + 1 not in self._kept:
            self._ahead = window + 1, self._worker.submit(self._make, window + 1)
        return self._kept[window]

    def _make(self, window: int) -> Samples:
        if self._reader is None or window < self._next:
            self._reader, self._next = self._examples(), 0
        while self._next < window:
            self._records()
        self._unread.skipped, self._unread.first_skipped = 0, None
        examples = self._records()
        counts = replace(self._unread, notes={})
        encoder = Encoder(self.renderer.tokenizer, fast=False)
        folder = Path(tempfile.mkdtemp(prefix="tunesmith-window-"))
        try:
            self.renderer.reset()
            writer = PartWriter(folder, f"window {window}", self.renderer.group_size)
            report = reporter(self.config, counts)
            for chunk in make_samples(iter(examples), self.config, self.renderer, encoder, counts, report):
                writer.add(*chunk)
            if not writer.num_samples:
                return Samples((), (), ())
            counts.notes |= self.renderer.notes
            counts.conversations = self.renderer.conversations
            writer.close(counts)
            return whole([Part.open(folder)], [self.sources[0].config], self.renderer.processor)
        finally:
            shutil.rmtree(folder)  # what is mapped stays readable

    def _records(self) -> list[Example]:
        """The next window's: `shuffle_window` of them, or what is left of a pass through sets that follow each other."""
        assert self._reader is not None
        records: list[Example] = []
        for example in self._reader:
            if example is not None:
                records.append(example)
            if len(records) == self.config.shuffle_window or (example is None and records):
                break
        self._next += 1
        return records

    def _examples(self) -> Iterator[Example | None]:
        """Records without end: one set after the other, or interleaved by weight; what ends begins again.

        None stands between the passes through all sets.
        """
        report = reporter(self.config, self._unread)
        while self.config.mix == "concat":
            found = False
            for source in self.sources:
                for example in read_examples(source, self.config.as_chat, report):
                    found = True
                    yield example
            if not found:
                raise UserError(f"{self.config.shown()}: no record that can be used")
            yield None
        weights = np.array([source.config.weight for source in self.sources])
        readers = [read_examples(source, self.config.as_chat, report) for source in self.sources]
        owed = np.zeros(len(self.sources))
        while True:
            owed += weights / weights.sum()
            chosen = int(owed.argmax())
            owed[chosen] -= 1
            drawn: Example | None = next(readers[chosen], None)
            if drawn is None:
                readers[chosen] = read_examples(self.sources[chosen], self.config.as_chat, report)
                drawn = next(readers[chosen], None)
            if drawn is None:
                raise UserError(f"{self.sources[chosen].name}: no record that can be used")
            yield drawn


@dataclass
class StreamDataset:
    """`data(step)` over a stream. Going on at a late step reads past what comes before, but tokenizes only from there."""

    windows: Windows
    config: DataConfig
    batch_size: int
    pack: bool
    seed: int
    index: Path
    """File that remembers how many samples each window gave, so that they need not be made to be counted."""
    share: bool = False
    """Whether the common beginning of a pair stands in a row once."""

    def __call__(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        samples, indices = self.at(step)
        return collate(samples, indices, self.config.max_tokens, self.pack, self.share)

    def at(self, step: int) -> tuple[Samples, list[int]]:
        """The windows that a step reaches into, as one set, and its samples there."""
        at = [self._find(position) for position in range(step * self.batch_size, (step + 1) * self.batch_size)]
        reached = {window: self._training(window) for window, _ in at}
        joined = Samples(
            tuple(part for samples in reached.values() for part in samples.parts),
            tuple(chosen for samples in reached.values() for chosen in samples.chosen),
            tuple(config for samples in reached.values() for config in samples.sets),
            self.windows.renderer.processor,
        )
        starts = dict(zip(reached, np.cumsum([0, *map(len, reached.values())]).tolist(), strict=False))
        return joined, [starts[window] + sample for window, sample in at]

    def _find(self, position: int) -> tuple[int, int]:
        """(window, sample in it) of a position in the stream."""
        sizes, window = self._sizes, 0
        while True:
            if window == len(sizes):
                sizes.append(len(self._training(window)))
                if not any(sizes[-EMPTY_WINDOWS:]) and len(sizes) >= EMPTY_WINDOWS:
                    raise UserError(f"{self.config.shown()}: {EMPTY_WINDOWS} windows without a sample to train on")
                self.index.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.index, json.dumps(sizes))
            if position < sizes[window]:
                return window, int(permute([position], sizes[window], self.seed, window)[0])
            position -= sizes[window]
            window += 1

    @cached_property
    def _sizes(self) -> list[int]:
        """Samples of each window so far."""
        found: list[int] = json.loads(self.index.read_text()) if self.index.is_file() else []
        return found

    @cached_property
    def _holds_out(self) -> bool:
        """Whether a share of the stream itself is held out."""
        return not eval_sources(self.config)

    def _training(self, window: int) -> Samples:
        samples = self.windows(window)
        if self._holds_out:
            samples = samples.select([~flags for flags in held_out_side(samples, self.config)])
        if window < len(self._sizes) and self._sizes[window] != len(samples):
            raise UserError(f"{self.config.shown()}: the data has changed while it was streamed; remove {self.index}")
        return samples


def _size(file: str) -> str | None:
    """What tells that a file has grown, without reading it: a stream is to start at once."""
    return file_content(file) if "://" in file else str(Path(file).stat().st_size)


def open_stream(run: RunConfig, renderer: Renderer) -> tuple[StreamDataset, Samples, Samples]:
    """The data set, the samples of its first window, and held-out samples: of data.eval_path, or from the first window."""
    config = run.data
    sources = training_sources(config)
    given = eval_sources(config)
    held_out = load_sources(given, config, renderer) if given else None
    windows = Windows(config, renderer, sources, keep=run.train.batch_size // config.shuffle_window + 3)
    first = windows(0)
    if not len(first):
        raise UserError(f"{config.shown()}: nothing to learn from in the first {config.shuffle_window} records")
    contents = [_size(file) for source in sources for file in source.files]
    of_all = hashlib.blake2b(json.dumps([first.fingerprint(), contents]).encode(), digest_size=16).hexdigest()
    first = replace(first, parts=(replace(first.parts[0], fingerprint=of_all),))
    if held_out is None:
        held_out = first.select(held_out_side(first, config))
    facts = json.dumps([first.fingerprint(), config.model_dump(mode="json")])
    key = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
    index = cache_folder() / "streams" / f"{key}.json"
    return (
        StreamDataset(windows, config, run.train.batch_size, pack=False, seed=run.seed, index=index),
        first,
        first_by_content(held_out, config.max_eval_samples),
    )
