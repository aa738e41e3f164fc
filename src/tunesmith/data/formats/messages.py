"""OpenAI form: {"messages": [{"role": "user", "content": "…"}, …]}."""

from __future__ import annotations

from tunesmith.data.formats.base import Format, Record, conversation, role_of, text_of
from tunesmith.errors import UserError
from tunesmith.types import Example, Message, Place


class Messages(Format):
    keys = "messages: [{role, content}, …]"

    def matches(self, record: Record) -> bool:
        return isinstance(record.get("messages"), list)

    def read(self, record: Record, place: Place) -> Example:
        system = text_of(record.get("system"), place, "system")
        messages = [Message("system", system)] if system else []
        for index, turn in enumerate(record["messages"], start=1):
            if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
                raise UserError(f"{place}: message {index}: expected role and content, found {turn!r:.80}")
            if turn.get("tool_calls"):
                raise UserError(f"{place}: message {index}: tool calls cannot be read yet; remove the record")
            content = text_of(turn["content"], place, f"message {index}: content")
            messages.append(Message(role_of(turn["role"], place, index), content))
        return conversation(messages, place)
