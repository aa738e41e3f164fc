"""OpenAI form: {"messages": [{"role": "user", "content": "…"}, …]}, with `system`, `tools` and lists of files beside it.

Content may come in parts, LLaMA-Factory's v1 form among them; turns may use ShareGPT's words, from and
value. An `answer` beside them is what a verifier compares.
"""

from __future__ import annotations

from tunesmith.data.formats.base import Format, Record, final_answer
from tunesmith.data.formats.turns import conversation, with_system
from tunesmith.types import Example, Place


class Messages(Format):
    keys = "messages: [{role, content}, …]"

    @classmethod
    def matches(cls, record: Record) -> bool:
        return isinstance(record.get("messages"), list)

    @classmethod
    def fits(cls, record: Record) -> bool:
        return "messages" in record

    def read(self, record: Record, place: Place) -> Example:
        messages = with_system(record["messages"], record, place, ("messages",))
        answer = record.get("answer")
        if not isinstance(answer, str | int | float) or isinstance(answer, bool):
            answer = None  # some other column of that name
        return conversation(
            messages, record, place, ("messages",), answer=None if answer is None else final_answer(str(answer))
        )
