"""A batch as one reads it: rows of sequences of tokens, with what truncation took from each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.samples import Samples
from tunesmith.inspect.pieces import Pieces
from tunesmith.inspect.rest import Rest
from tunesmith.types import Batch, Place

if TYPE_CHECKING:
    from tunesmith.types import Form


@dataclass(frozen=True)
class Token:
    """A token and its own text."""

    id: int
    text: str
    position: int
    weight: float
    """Loss weight."""
    special: bool
    """Whether it is a control token."""


@dataclass(frozen=True)
class Strand:
    """A sequence inside a row."""

    number: int
    """In the batch."""
    sample: int
    place: Place
    says: str
    """What the data says of it, such as rejected or desirable; "" where nothing."""
    tokens: list[Token]
    before: list[Token]
    """What truncation cut off its left end."""
    after: list[Token]
    """The same of its right end."""

    @property
    def learnt(self) -> int:
        return sum(token.weight != 0 for token in self.tokens)


@dataclass(frozen=True)
class Row:
    """A row of the batch."""

    number: int
    strands: list[Strand]
    padding: int
    """Tokens after the last sequence."""


@dataclass(frozen=True)
class View:
    """Batches to show, of one row or many."""

    title: str
    facts: list[str]
    """What else to know, a line each."""
    rows: list[Row]
    split: bool
    """What was cut off a sequence is another sample, and not lost."""


def what_is_said(form: Form, label: float, side: int, words: Sequence[str]) -> str:
    """What the data says of a sequence beside its tokens. `side`: its number in its sample; `words`: of the classes."""
    if form == "pairs":
        return ("chosen", "rejected")[side] + (f", margin {label:g}" if label else "")
    if form == "feedback":
        return "desirable" if label else "undesirable"
    if form == "choices":
        return f"class {int(label)} of " + ", ".join(map(repr, words))
    return ""


def rows_of(batch: Batch, samples: Samples, pieces: Pieces, rest: Rest) -> list[Row]:
    """The rows of a batch whose `sample_N` counts in `samples`."""
    seen: Counter[int] = Counter()
    rows = []
    for r, sequence_T in enumerate(batch.sequence_BT.numpy()):
        strands = []
        for number in dict.fromkeys(sequence_T[sequence_T >= 0].tolist()):
            own = sequence_T == number
            ids, weights = batch.tokens_BT[r].numpy()[own], batch.weights_BT[r].numpy()[own]
            sample, group = int(batch.sample_N[number]), int(batch.group_N[number])
            place, side = samples.place(sample), seen[group]
            seen[group] += 1
            positions = batch.positions_BT[r].numpy()[own].tolist()
            before, after = rest.find(place, side, ids)
            words = [pieces.decoded([token]) for token in samples.choices(sample).tolist()]
            whole = [*before.ids, *ids.tolist(), *after.ids]
            texts = pieces(whole) if before.ids or after.ids else []
            start, stop = len(before.ids), len(before.ids) + len(ids)
            strands.append(
                Strand(
                    number, sample, place, what_is_said(rest.renderer.form, samples.label(sample), side, words),
                    _tokens(ids.tolist(), pieces(ids.tolist()), positions, weights.tolist(), pieces),
                    _tokens(before.ids, texts[:start], range(-start, 0), before.weights, pieces),
                    _tokens(after.ids, texts[stop:], range(len(ids), len(ids) + len(after.ids)), after.weights, pieces),
                )
            )  # fmt: skip
        rows.append(Row(r, strands, int((sequence_T < 0).sum())))
    return rows


def _tokens(
    ids: Sequence[int], texts: Sequence[str], positions: Sequence[int], weights: Sequence[float], pieces: Pieces
) -> list[Token]:
    return [
        Token(token, text, position, weight, token in pieces.special)
        for token, text, position, weight in zip(ids, texts, positions, weights, strict=True)
    ]


def rows_as_json(batch: Batch, pieces: Pieces) -> list[dict[str, Any]]:
    """The rows as they stand in the batch, padding included (sequence -1, text ""), and the label of each sequence."""
    rows = []
    labels = batch.sequence_columns["label"].tolist()
    for r, sequence_T in enumerate(batch.sequence_BT.numpy()):
        tokens = batch.tokens_BT[r].numpy()
        texts = [""] * len(tokens)
        for number in dict.fromkeys(sequence_T[sequence_T >= 0].tolist()):
            at = np.flatnonzero(sequence_T == number)
            for column, text in zip(at.tolist(), pieces(tokens[at].tolist()), strict=True):
                texts[column] = text
        rows.append(
            {
                "tokens": tokens.tolist(),
                "text": texts,
                "weights": batch.weights_BT[r].tolist(),
                "sequence": sequence_T.tolist(),
                "labels": {number: labels[number] for number in dict.fromkeys(sequence_T[sequence_T >= 0].tolist())},
            }
        )
    return rows
