"""What a data format does: recognise a record and read it into an Example. And what all formats need for that."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from tunesmith.config import SetConfig
from tunesmith.errors import DataError
from tunesmith.errors import Path as ValuePath
from tunesmith.types import Example, Piece, Place

Record = Mapping[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
CALL_ROLE = "function_call"
"""ShareGPT's role for a turn of the assistant that is nothing but tool calls."""
CONVERSATIONS = ("messages", "conversations")
"""Keys of a list of turns."""
OUTPUTS = ("output", "response")
"""Keys of alpaca's answer."""

FINAL_ANSWER = "#### "
STEP_BREAK = "\n\n"
"""Stands between the steps of a solution."""


class Format:
    """One form of records. Subclasses name it, recognise it by its keys, and read it."""

    keys: ClassVar[str]
    """The keys that make the form, for messages."""

    def __init__(self, config: SetConfig) -> None:
        self.config = config

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Whether a record has this form."""
        raise NotImplementedError

    @classmethod
    def fits(cls, record: Record) -> bool:
        """Whether a record has the keys that this form needs, once the form is known. What their values are, `read` says."""
        return cls.matches(record)

    def read(self, record: Record, place: Place) -> Example:
        """The record as an Example. Raises DataError that says where in the record, what is wrong and how to mend it."""
        raise NotImplementedError


def text_of(value: Any, place: Place, path: ValuePath) -> str:
    """`value` if it is text; None counts as empty. Anything else is an error, never silently dropped."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(place, path, f"expected text, found {type(value).__name__}", "write it as a string")
    return value


def word_of(value: Any, place: Place, path: ValuePath) -> str:
    """Text or a number, as text: what a label or an answer may be."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return text_of(value, place, path)


def final_answer(text: str) -> str:
    """What stands after GSM8K's mark, or else all of it."""
    return text.rpartition(FINAL_ANSWER)[2].strip() if FINAL_ANSWER in text else text


def json_of(text: str, place: Place, path: ValuePath) -> Any:
    """What a string of JSON says."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        # A reader sees to the file's own JSON; this is JSON within it. Half a character is none, and no tokenizer takes it.
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            place, path, f"half of a surrogate pair ({half})", "write the whole pair, or remove it"
        ) from error
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        what = f"not JSON: {getattr(error, 'msg', 'nested too deeply')}{where}"
        raise DataError(place, path, what, "write valid JSON in the string") from error


def show(value: Any) -> str:
    """A value for a message, cut to a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def hint(word: Any, known: Iterable[str]) -> str:
    """The nearest known word, or all of them."""
    known = list(known)
    return nearest(word, known) or f"known: {', '.join(known)}"


def nearest(word: Any, known: Iterable[str]) -> str:
    """What may have been meant, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6) if isinstance(word, str) else []
    return f"did you mean {close[0]}?" if close else ""


def first_key(record: Record, keys: Iterable[str]) -> str | None:
    """The first of the keys that the record has."""
    return next((key for key in keys if key in record), None)


def prompt_and_completion(prompt: str, completion: str, place: Place) -> Example:
    """Plain text of which the completion is learnt."""
    return Example(place, pieces=(Piece(prompt, learn=False), Piece(completion, learn=True)))
