"""ShareGPT form: {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], "system": "…"}.

A turn of the role function_call holds the JSON of one call or of a list; observation holds what the tool said.
"""

from __future__ import annotations

from tunesmith.data.formats.base import Format, Record
from tunesmith.data.formats.turns import conversation, with_system
from tunesmith.types import Example, Place


class Sharegpt(Format):
    keys = "conversations: [{from, value}, …]"

    @classmethod
    def matches(cls, record: Record) -> bool:
        return isinstance(record.get("conversations"), list)

    @classmethod
    def fits(cls, record: Record) -> bool:
        return "conversations" in record

    def read(self, record: Record, place: Place) -> Example:
        messages = with_system(record["conversations"], record, place, ("conversations",))
        return conversation(messages, record, place, ("conversations",))
