"""Plain text: {"text": "…"}, or one document per line of a .txt file. All of it is learnt."""

from __future__ import annotations

from tunesmith.data.formats.base import Format, Record, text_of
from tunesmith.types import Example, Piece, Place


class Text(Format):
    keys = "text"

    def matches(self, record: Record) -> bool:
        return "text" in record

    def read(self, record: Record, place: Place) -> Example:
        return Example(place, pieces=(Piece(text_of(record["text"], place, "text"), learn=True),))
