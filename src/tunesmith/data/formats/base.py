"""What a data format does: recognise a record and read it into an Example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tunesmith.errors import UserError
from tunesmith.types import Example, Message, Place

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
}


class Format:
    """One form of records. Subclasses name it, recognise it by its keys, and read it."""

    keys: ClassVar[str]
    """The keys that make the form, for messages."""

    def matches(self, record: Record) -> bool:
        """Whether a record has this form."""
        raise NotImplementedError

    def read(self, record: Record, place: Place) -> Example:
        """The record as an Example. Raises UserError that names the place and what to mend."""
        raise NotImplementedError


def text_of(value: Any, place: Place, what: str) -> str:
    """`value` if it is text; None counts as empty. Anything else is an error, never silently dropped."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: {what}: expected text, found {type(value).__name__}; write it as a string")
    return value


def conversation(messages: list[Message], place: Place) -> Example:
    """An Example from messages, whose roles must take turns: [system] user assistant user assistant …"""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    expected = "user"
    for index, message in enumerate(turns, start=len(messages) - len(turns)):
        if message.role != expected:
            raise UserError(
                f"{place}: message {index + 1}: roles out of order: expected {expected}, found {message.role}; "
                "turns go [system] user assistant user assistant …"
            )
        expected = "assistant" if expected == "user" else "user"
    if not turns:
        raise UserError(f"{place}: a conversation without turns; give at least one user and one assistant message")
    return Example(place, messages=tuple(messages))


def role_of(name: Any, place: Place, index: int) -> str:
    """Our role for a role name of any of the common dialects."""
    if not isinstance(name, str) or name not in ROLES:
        raise UserError(f"{place}: message {index}: unknown role {name!r}; known: {', '.join(ROLES)}")
    return ROLES[name]
