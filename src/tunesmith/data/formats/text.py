"""Plain text: {"text": "…"}, or the documents of a .txt file. All of it is learnt."""

from __future__ import annotations

from tunesmith.data.formats.base import Format, Record, text_of
from tunesmith.data.formats.media import refuse_lists
from tunesmith.types import Example, Piece, Place


class Text(Format):
    keys = "text"

    @classmethod
    def matches(cls, record: Record) -> bool:
        return "text" in record

    def read(self, record: Record, place: Place) -> Example:
        refuse_lists(record, place)
        return Example(place, pieces=(Piece(text_of(record["text"], place, ("text",)), learn=True),))
