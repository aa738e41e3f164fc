"""ShareGPT form: {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], "system": "…"}."""

from __future__ import annotations

from tunesmith.data.formats.base import Format, Record, conversation, role_of, text_of
from tunesmith.errors import UserError
from tunesmith.types import Example, Message, Place


class Sharegpt(Format):
    keys = "conversations: [{from, value}, …]"

    def matches(self, record: Record) -> bool:
        return isinstance(record.get("conversations"), list)

    def read(self, record: Record, place: Place) -> Example:
        system = text_of(record.get("system"), place, "system")
        messages = [Message("system", system)] if system else []
        for index, turn in enumerate(record["conversations"], start=1):
            if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
                raise UserError(f"{place}: message {index}: expected from and value, found {turn!r:.80}")
            content = text_of(turn["value"], place, f"message {index}: value")
            messages.append(Message(role_of(turn["from"], place, index), content))
        return conversation(messages, place)
