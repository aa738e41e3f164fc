"""All samples of a data set, tokenized, in flat arrays; what was cut and dropped is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tunesmith.config import DataConfig
from tunesmith.data.formats import find_format
from tunesmith.data.sources import read_records
from tunesmith.data.template import Rendered, Renderer
from tunesmith.errors import UserError
from tunesmith.types import Example, Place


@dataclass
class Counts:
    """What happened on the way from records to samples."""

    records: int = 0
    truncated: int = 0
    dropped: int = 0
    """Too long under truncation: drop, or without any target after the cut."""
    first_cut: Place | None = None
    """The first record that was cut or dropped."""


@dataclass(frozen=True)
class Samples:
    """Tokenized samples, end to end. Sample i is `tokens[offsets[i]:offsets[i+1]]`."""

    tokens: np.ndarray
    """int32 [total tokens]."""
    weights: np.ndarray
    """float32 [total tokens]: loss weight of predicting each token."""
    offsets: np.ndarray
    """int64 [samples + 1]."""
    places: list[Place]
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def select(self, indices: Iterable[int]) -> Samples:
        """The given samples as a set of their own, with the counts of the whole."""
        chosen = list(indices)
        parts = [slice(self.offsets[i], self.offsets[i + 1]) for i in chosen]
        return _flat(
            [(self.tokens[p], self.weights[p], self.places[i]) for i, p in zip(chosen, parts, strict=True)], self.counts
        )

    def content_hash(self, index: int) -> int:
        """64 bits of the sample's tokens: the same wherever it stands in the file."""
        part = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        return int.from_bytes(hashlib.blake2b(part.astype("<i4").tobytes(), digest_size=8).digest(), "big")

    def fingerprint(self) -> str:
        """Hash of every token and weight, for the manifest and the resume check."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens.astype("<i4"), self.weights.astype("<f4"), self.offsets.astype("<i8")):
            digest.update(array.tobytes())
        return digest.hexdigest()


def load_samples(config: DataConfig, renderer: Renderer) -> tuple[Samples, Samples]:
    """Training and held-out samples. Raises UserError for the first record that cannot be used."""
    samples = _tokenize(config, renderer, config.path, "train")
    eval_path = config.eval_path or ("demo" if config.path == "demo" else None)
    if eval_path:
        held_out = _tokenize(config, renderer, eval_path, "eval")
        return samples, held_out.select(range(min(len(held_out), config.max_eval_samples)))
    limit = int(config.eval_fraction * 2**64)
    side = [samples.content_hash(index) < limit for index in range(len(samples))]
    train = [index for index, is_out in enumerate(side) if not is_out]
    if not train:
        raise UserError(f"data.eval_fraction: {config.eval_fraction} leaves nothing of {config.path} to train on")
    out = [index for index, is_out in enumerate(side) if is_out]
    return samples.select(train), samples.select(out[: config.max_eval_samples])


def read_examples(path: str, format_name: str, split: str) -> Iterator[Example]:
    """Records of a file as examples, in the form that the first record has."""
    reader = None
    for record, place in read_records(path, split):
        reader = reader or find_format(format_name, record, place)
        if not reader.matches(record):
            find_format(format_name, record, place)  # raises if no form fits at all
            raise UserError(f"{place}: not of the form of the records before it; expected {reader.keys}")
        yield reader.read(record, place)


def _tokenize(config: DataConfig, renderer: Renderer, path: str, split: str) -> Samples:
    counts, kept = Counts(), []
    for example in read_examples(path, config.format, split):
        counts.records += 1
        rendered = renderer.render(example)
        if len(rendered.tokens) <= config.max_tokens:
            pieces = [rendered]
        else:
            pieces = _shorten(rendered, config, example.place)
            counts.truncated += bool(pieces)
            counts.dropped += not pieces
            counts.first_cut = counts.first_cut or example.place
        kept += [(piece.tokens, piece.weights, example.place) for piece in pieces]
    if not kept:
        raise UserError(
            f"{path}: nothing to learn from: all {counts.records} samples lost their answers at data.max_tokens: "
            f"{config.max_tokens}; raise it, or set data.truncation: left"
        )
    return _flat(kept, counts)


def _shorten(rendered: Rendered, config: DataConfig, place: Place) -> list[Rendered]:
    """A sample longer than max_tokens under the truncation policy; parts without a target are left out."""
    limit, length = config.max_tokens, len(rendered.tokens)
    if config.truncation == "error":
        raise UserError(
            f"{place}: {length} tokens, more than data.max_tokens: {limit}; raise it, or set data.truncation to "
            "right, left, split or drop"
        )
    starts = {"drop": [], "right": [0], "left": [length - limit], "split": list(range(0, length, limit))}
    pieces = []
    for start in starts[config.truncation]:
        part = slice(start, start + limit)
        weights = [0.0, *rendered.weights[part][1:]]
        if any(weights):
            pieces.append(Rendered(rendered.tokens[part], weights))
    return pieces


def _flat(kept: list, counts: Counts) -> Samples:
    offsets = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum([len(tokens) for tokens, _, _ in kept], out=offsets[1:])
    tokens = np.concatenate([np.asarray(tokens, dtype=np.int32) for tokens, _, _ in kept] or [np.zeros(0, np.int32)])
    weights = np.concatenate([np.asarray(part, dtype=np.float32) for _, part, _ in kept] or [np.zeros(0, np.float32)])
    return Samples(tokens, weights, offsets, [place for _, _, place in kept], counts)
