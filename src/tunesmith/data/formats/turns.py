"""Lists of turns, in OpenAI's or ShareGPT's words, to messages; and the order in which turns may come."""

from __future__ import annotations

from typing import Any

from tunesmith.data.formats.base import CALL_ROLE, ROLES, Record, hint, show, text_of
from tunesmith.data.formats.media import Content, fill_placeholders, has_lists, read_parts
from tunesmith.data.formats.tools import read_calls, read_tools
from tunesmith.errors import DataError
from tunesmith.errors import Path as ValuePath
from tunesmith.types import Example, Message, Place, ToolCall

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
WEIGHT_KEYS = ("weight", "loss_weight")
PLAIN_ROLES = {name: role for name, role in ROLES.items() if role != "tool"}
"""Roles of a turn that is nothing but text."""
THOUGHT_START, THOUGHT_END = "<think>", "</think>"

START, CALLS = "the start", "a tool call"
FOLLOWERS = {
    START: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    CALLS: ("user", "assistant", "tool"),
    "tool": ("tool", "assistant"),
}
"""[system] (user (assistant [tool … assistant] …)) …"""
ORDER_REMEDIES = {
    (START, "assistant"): "give the user's turn before it, or remove this one",
    ("system", "assistant"): "give the user's turn before it, or remove this one",
    ("user", "user"): "join the two into one turn",
    ("assistant", "assistant"): "join the two into one turn, or give the user's turn between them",
    ("tool", "user"): "give the assistant's answer to the tool between them",
}


def read_turns(turns: Any, place: Place, path: ValuePath, record: Record, after: str = START) -> list[Message]:
    """The messages of a list of turns. `after`: the role that the list follows on."""
    if not isinstance(turns, list):
        raise DataError(place, path, f"expected a list of messages, found {show(turns)}", "write a list")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        message = _plain_turn(turn)
        if message is None:
            message = _read_turn(turn, place, (*path, index), record)
        if message.role not in FOLLOWERS[after]:
            key = first_of(turn, ROLE_KEYS) or ROLE_KEYS[0]
            raise _out_of_order(after, message.role, place, (*path, index, key))
        after = CALLS if message.tool_calls else message.role
        messages.append(message)
    return messages


def _plain_turn(turn: Any) -> Message | None:
    """A turn of role and text alone, which most are; None for any other."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return None
    role, content = turn.get("role"), turn.get("content")
    if role is None:
        role, content = turn.get("from"), turn.get("value")
    if not isinstance(content, str) or not isinstance(role, str) or role not in PLAIN_ROLES:
        return None
    return Message(PLAIN_ROLES[role], content)


def first_of(turn: Record, keys: tuple[str, ...]) -> str | None:
    """The first of the keys under which the turn has a value."""
    for key in keys:
        if turn.get(key) is not None:
            return key
    return None


def _read_turn(turn: Any, place: Place, path: ValuePath, record: Record) -> Message:
    if not isinstance(turn, dict):
        what = f"expected a message, found {show(turn)}"
        raise DataError(place, path, what, 'write {"role": "user", "content": "…"}')
    said_by, role = _read_role(turn, place, path)
    content: Content = ""
    reasoning = ""
    calls: tuple[ToolCall, ...] = ()
    content_key = first_of(turn, CONTENT_KEYS)
    value = turn[content_key] if content_key else None
    here = (*path, content_key or "content")
    if said_by == CALL_ROLE:
        reasoning, calls = _read_call_turn(text_of(value, place, here), place, here)
    elif isinstance(value, list):
        content, reasoning, calls = read_parts(value, place, here, record)
    else:
        content = text_of(value, place, here)
    reasoning = _read_reasoning(turn, place, path) or reasoning
    for key in CALL_KEYS:
        calls = read_calls(turn.get(key), place, (*path, key)) or calls
    if content_key is None and not (calls or reasoning) and not any(key in turn for key in CONTENT_KEYS):
        raise DataError(place, path, f"a message without content, with the keys {', '.join(turn)}", "add content")
    if role != "assistant" and (calls or reasoning):
        what = f"{'tool calls' if calls else 'reasoning'} of the {role}"
        key = first_of(turn, (*CALL_KEYS, *REASONING_KEYS)) or content_key or "content"
        raise DataError(
            place, (*path, key), what, "only the assistant's turns can have them; remove them or mend the role"
        )
    is_tool = role == "tool"
    return Message(
        role,
        content,
        reasoning,
        calls,
        name=text_of(turn.get("name"), place, (*path, "name")) or None if is_tool else None,
        call_id=text_of(turn.get("tool_call_id"), place, (*path, "tool_call_id")) or None if is_tool else None,
        weight=_read_weight(turn, place, path),
    )


def _read_role(turn: Record, place: Place, path: ValuePath) -> tuple[str, str]:
    """The role in the data's own word and in ours."""
    key = next((key for key in ROLE_KEYS if key in turn), None)
    if key is None:
        what = f"a message without role, with the keys {', '.join(turn) or '(none)'}"
        raise DataError(place, path, what, 'write {"role": "user", "content": "…"}')
    name = turn[key]
    role = "assistant" if name == CALL_ROLE else ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(place, (*path, key), f"unknown role {show(name)}", hint(name, (*ROLES, CALL_ROLE)))
    return name, role


def _read_call_turn(text: str, place: Place, path: ValuePath) -> tuple[str, tuple[ToolCall, ...]]:
    """Reasoning and calls of a turn of the role function_call: JSON, maybe after <think>…</think>."""
    reasoning = ""
    if text.lstrip().startswith(THOUGHT_START) and THOUGHT_END in text:
        reasoning, text = text.lstrip().removeprefix(THOUGHT_START).split(THOUGHT_END, 1)
    return reasoning.strip("\n"), read_calls(text, place, path)


def _read_reasoning(turn: Record, place: Place, path: ValuePath) -> str:
    key = first_of(turn, REASONING_KEYS)
    return text_of(turn[key], place, (*path, key)) if key else ""


def _read_weight(turn: Record, place: Place, path: ValuePath) -> float | None:
    key = first_of(turn, WEIGHT_KEYS)
    if key is None:
        return None
    weight = turn[key]
    if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise DataError(
            place, (*path, key), f"expected a loss weight, found {show(weight)}", "write 0, 1 or any number ≥ 0"
        )
    return float(weight)


def _out_of_order(after: str, role: str, place: Place, path: ValuePath) -> DataError:
    what = f"roles out of order: {role} {'at' if after == START else 'after'} {after}"
    remedy = ORDER_REMEDIES.get((after, role), "")
    if role == "system":
        remedy = "a system message comes first, and only once; move or join it"
    elif role == "tool":
        remedy = "give the assistant's turn that calls the tool before it"
    return DataError(place, path, what, remedy or f"after {after} comes {' or '.join(FOLLOWERS[after])}")


def with_system(turns: Any, record: Record, place: Place, path: ValuePath) -> list[Message]:
    """The messages of a list of turns, after the record's `system` where it has one."""
    system = record.get("system")
    if not system:
        return read_turns(turns, place, path, record)
    message = Message("system", text_of(system, place, ("system",)))
    return [message, *read_turns(turns, place, path, record, after="system")]


def conversation(
    messages: list[Message],
    record: Record,
    place: Place,
    path: ValuePath,
    *,
    answer: str | None = None,
    choices: tuple[str, ...] = (),
) -> Example:
    """The example of a conversation, with the record's tools, and its files in their places. `path` leads to the turns."""
    if not messages or messages[-1].role == "system":
        raise DataError(place, path, "a conversation without turns", "give at least one user message and its answer")
    if has_lists(record):
        messages = fill_placeholders(messages, record, place)
    tools = read_tools(record, place) if record.get("tools") else ()
    return Example(place, tuple(messages), tools=tools, answer=answer, choices=choices)


def with_answer(messages: list[Message], answer: Any, record: Record, place: Place, path: ValuePath) -> list[Message]:
    """The messages and the answer to them: a list of turns, one turn, or text."""
    after = START if not messages else CALLS if messages[-1].tool_calls else messages[-1].role
    if isinstance(answer, list):
        return messages + read_turns(answer, place, path, record, after)
    if isinstance(answer, dict):
        turn = _read_turn(answer, place, path, record)
        if turn.role not in FOLLOWERS[after]:
            raise _out_of_order(after, turn.role, place, (*path, first_of(answer, ROLE_KEYS) or ROLE_KEYS[0]))
        return [*messages, turn]
    text = text_of(answer, place, path)
    if "assistant" not in FOLLOWERS[after]:
        raise _out_of_order(after, "assistant", place, path)
    return [*messages, Message("assistant", text)]


def read_prompt(prompt: Any, record: Record, place: Place, path: ValuePath) -> list[Message]:
    """The messages of a prompt: a list of turns, or the text of the user's turn; after the record's `system`."""
    if isinstance(prompt, list):
        return with_system(prompt, record, place, path)
    system = text_of(record.get("system"), place, ("system",))
    return [Message("system", system)] * bool(system) + [Message("user", text_of(prompt, place, path))]
