"""What truncation took from a sequence: its record is read and encoded once more, without a limit."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from tunesmith.config import DataConfig
from tunesmith.data.choices import choose
from tunesmith.data.encode import Encoder
from tunesmith.data.examples import read_examples
from tunesmith.data.prepare import eval_sources, training_sources
from tunesmith.data.render import Renderer
from tunesmith.data.samples import sequences_of
from tunesmith.errors import DataError, UserError
from tunesmith.types import Example, Place


@dataclass(frozen=True)
class End:
    """Tokens that were cut off one end of a sequence, and the loss weights that they would have."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def _ignore(error: UserError, raw: str | None) -> None:
    """Named already when the samples were made."""


@dataclass
class Rest:
    """The whole sequences of records, by place."""

    config: DataConfig
    renderer: Renderer
    whole: dict[Place, list[list[tuple[np.ndarray, np.ndarray]]]] = field(default_factory=dict)
    """Place → samples → sequences → (tokens, weights), none of them cut."""

    def read(self, places: Collection[Place]) -> None:
        """Read these records, if samples can have been cut at all."""
        missing = set(places) - set(self.whole)
        for source in [*training_sources(self.config), *eval_sources(self.config)]:
            if not missing:
                return
            with contextlib.suppress(UserError):  # a record after those wanted may be bad
                for example in read_examples(source, self.config.as_chat, _ignore):
                    if example.place in missing:
                        missing.discard(example.place)
                        self.whole[example.place] = self._encode(example)
                        if not missing:
                            return

    def _encode(self, example: Example) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        try:
            samples = self.renderer.render(example)
        except DataError:
            return []
        encoded = Encoder(self.renderer.tokenizer, fast=False).encode([marked for group in samples for marked in group])
        if self.renderer.form == "choices":
            questions, encoded, _ = choose([(example, sample) for sample in samples], encoded, _ignore)
            samples = [sample for _, sample in questions]
        sequences = iter(list(sequences_of(encoded)))
        return [[next(sequences) for _ in group] for group in samples]

    def find(self, place: Place, side: int, tokens: np.ndarray) -> tuple[End, End]:
        """What stood before and after `tokens` in the record. `side`: which sequence of the sample."""
        candidates = [sample[side] for sample in self.whole.get(place, [])]
        if any(np.array_equal(whole, tokens) for whole, _ in candidates):
            return End(), End()
        for whole, weights in candidates:
            size, limit = len(tokens), self.config.max_tokens
            starts = [0, len(whole) - size, *range(limit, len(whole), limit)]  # right, left, split
            for start in starts:
                if start >= 0 and np.array_equal(whole[start : start + size], tokens):
                    stop = start + size
                    return (
                        End(whole[:start].tolist(), weights[:start].tolist()),
                        End(whole[stop:].tolist(), weights[stop:].tolist()),
                    )
        return End(), End()
