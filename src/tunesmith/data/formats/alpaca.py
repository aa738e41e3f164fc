"""Alpaca form: {"instruction": "…", "input": "…", "output": "…", "system": "…", "history": [["question", "answer"], …]}.

Instruction and input become one user turn, joined by a newline; the model's own chat template does the rest. Dolly's
and GPTeacher's names, context and response, count as input and output.
"""

from __future__ import annotations

from tunesmith.data.formats.base import OUTPUTS, Format, Record, first_key, show, text_of
from tunesmith.data.formats.turns import conversation
from tunesmith.errors import DataError
from tunesmith.types import Example, Message, Place

INPUTS = ("input", "context")


class Alpaca(Format):
    keys = "instruction, output (and input, system, history)"

    @classmethod
    def matches(cls, record: Record) -> bool:
        return "instruction" in record and first_key(record, OUTPUTS) is not None

    def read(self, record: Record, place: Place) -> Example:
        key = first_key(record, OUTPUTS)
        assert key is not None, "read a record that does not fit"
        answer = Message("assistant", text_of(record[key], place, (key,)))
        return conversation([*alpaca_prompt(record, place), answer], record, place, (key,))


def alpaca_prompt(record: Record, place: Place, question: str = "instruction") -> list[Message]:
    """System, history and the user's turn of a record in alpaca form. `question`: the instruction's key."""
    system = text_of(record.get("system"), place, ("system",))
    messages = [Message("system", system)] if system else []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError(
            place, ("history",), f"expected a list of pairs, found {show(history)}", "write [[question, answer], …]"
        )
    for index, pair in enumerate(history):
        path = ("history", index)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(place, path, f"expected a pair, found {show(pair)}", "write [question, answer]")
        asked, answered = (text_of(text, place, (*path, side)) for side, text in enumerate(pair))
        messages += [Message("user", asked), Message("assistant", answered)]
    keys = dict.fromkeys((question, first_key(record, INPUTS) or INPUTS[0]))
    lines = [text_of(record.get(key), place, (key,)) for key in keys]
    messages.append(Message("user", "\n".join(line for line in lines if line)))
    return messages
