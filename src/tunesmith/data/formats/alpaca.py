"""Alpaca form: {"instruction": "…", "input": "…", "output": "…", "system": "…", "history": [["question", "answer"], …]}.

Instruction and input become one user turn, joined by a newline; the model's own chat template does the rest.
"""

from __future__ import annotations

from tunesmith.data.formats.base import Format, Record, conversation, text_of
from tunesmith.errors import UserError
from tunesmith.types import Example, Message, Place


class Alpaca(Format):
    keys = "instruction, output (and input, system, history)"

    def matches(self, record: Record) -> bool:
        return "instruction" in record and "output" in record

    def read(self, record: Record, place: Place) -> Example:
        system = text_of(record.get("system"), place, "system")
        messages = [Message("system", system)] if system else []
        history = record.get("history") or []
        if not isinstance(history, list):
            raise UserError(f"{place}: history: expected a list of [question, answer], found {type(history).__name__}")
        for index, pair in enumerate(history, start=1):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise UserError(f"{place}: history {index}: expected [question, answer], found {pair!r:.80}")
            question, answer = (text_of(text, place, f"history {index}") for text in pair)
            messages += [Message("user", question), Message("assistant", answer)]
        asked = [text_of(record.get(key), place, key) for key in ("instruction", "input")]
        messages.append(Message("user", "\n".join(text for text in asked if text)))
        messages.append(Message("assistant", text_of(record["output"], place, "output")))
        return conversation(messages, place)
