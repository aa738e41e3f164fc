"""Messages as chat templates read them, in each template's own spelling; and sentinels around their words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.types import Media, Message

Turn = dict[str, Any]
Dicts = list[Turn]

THOUGHT = re.compile(r"\s*<think>\s*(.*?)\s*</think>", re.DOTALL)
FIRST_SENTINEL = 0x100000  # in the last private plane of Unicode
SENTINEL = re.compile("[\U00100000-\U00107fff]")
SENTINELS_A_TURN = 6  # around its reasoning, its words and its tool calls


@dataclass(frozen=True)
class Spelling:
    """What templates disagree in."""

    arguments_as_text: bool = False
    """The arguments of a tool call are JSON text and not an object."""
    no_content_beside_calls: bool = False
    """A turn of nothing but tool calls has None as content, and not an empty text."""
    thought_in_content: bool = False
    """The reasoning stands in the content, in <think> tags."""


def as_dicts(messages: Sequence[Message], spelling: Spelling = Spelling()) -> Dicts:
    """Messages as chat templates read them. A tool's answer without an id answers the calls before it in turn."""
    turns, number = [], 0
    unanswered: list[str] = []
    for message in messages:
        turn: Turn = {"role": message.role, "content": _content(message)}
        if message.reasoning and spelling.thought_in_content and isinstance(message.content, str):
            turn["content"] = f"<think>\n{message.reasoning.strip()}\n</think>\n\n{message.content}"
        elif message.reasoning:
            turn["reasoning_content"] = turn["reasoning"] = message.reasoning
        if message.tool_calls:
            # nine characters: some templates insist on it
            ids = [call.id or f"call{number + n:05d}" for n, call in enumerate(message.tool_calls)]
            number, unanswered = number + len(ids), ids.copy()
            turn["tool_calls"] = [_call(*pair, spelling) for pair in zip(message.tool_calls, ids, strict=True)]
            if spelling.no_content_beside_calls and not turn["content"]:
                turn["content"] = None
        if message.role == "tool":
            turn["tool_call_id"] = message.call_id or (unanswered[0] if unanswered else "call00000")
            if turn["tool_call_id"] in unanswered:
                unanswered.remove(turn["tool_call_id"])
            turn["name"] = message.name or ""
        turns.append(turn)
    return turns


def _content(message: Message) -> Any:
    if isinstance(message.content, str):
        return message.content
    return [
        {"type": part.kind} if isinstance(part, Media) else {"type": "text", "text": part} for part in message.content
    ]


def _call(call: Any, id: str, spelling: Spelling) -> Turn:
    arguments = json.dumps(call.arguments, ensure_ascii=False) if spelling.arguments_as_text else call.arguments
    return {"type": "function", "id": id, "function": {"name": call.name, "arguments": arguments}}


def thought_and_words(message: Message) -> tuple[str, str]:
    """What the assistant thought, be it apart or in <think> tags, and what it said; without media."""
    content = message.content
    words = content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))
    inline = None if message.reasoning else THOUGHT.match(words)
    return (inline[1], words[inline.end() :]) if inline else (message.reasoning.strip(), words)


def has_all_calls(message: Message, text: str) -> bool:
    """Whether names and arguments of all the turn's tool calls stand in the text."""
    names = [call.name for call in message.tool_calls]
    if any(text.count(name) < names.count(name) for name in names):
        return False
    values = [value for call in message.tool_calls for value in _leaves(call.arguments)]
    return all(any(spelt in text for spelt in _spellings(value)) for value in values)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    elif value is not None:  # some templates leave null arguments out
        yield value


def _spellings(value: Any) -> tuple[str, ...]:
    plain, ascii = json.dumps(value, ensure_ascii=False), json.dumps(value)
    return (value, plain[1:-1], ascii[1:-1]) if isinstance(value, str) else (str(value), plain, ascii)


def wrap(turn: Turn, index: int) -> Turn:
    """The turn with sentinels around its words, inside of their white space, since templates trim it.

    Not around <think>, by which templates find the reasoning. Of tool calls, the first name and the last one are marked.
    """
    marks = [chr(FIRST_SENTINEL + SENTINELS_A_TURN * index + n) for n in range(SENTINELS_A_TURN)]
    (thought, said, called), wrapped = zip(marks[::2], marks[1::2], strict=True), dict(turn)
    if isinstance(turn["content"], str):
        inline = THOUGHT.match(turn["content"])
        before, words = (inline[0], turn["content"][inline.end() :]) if inline else ("", turn["content"])
        wrapped["content"] = (_around(before, inline.span(1), thought) if inline else "") + _around_words(words, said)
    elif turn["content"]:
        wrapped["content"] = [
            {**part, "text": _around_words(part["text"], said)} if "text" in part else part for part in turn["content"]
        ]
    for key in {"reasoning_content", "reasoning"} & set(turn):
        wrapped[key] = _around_words(turn[key], thought)
    if "tool_calls" in turn:
        calls = [{**call, "function": dict(call["function"])} for call in turn["tool_calls"]]
        calls[0]["function"]["name"] = called[0] + calls[0]["function"]["name"]
        calls[-1]["function"]["name"] += called[1]
        wrapped["tool_calls"] = calls
    return wrapped


def _around_words(text: str, marks: tuple[str, str]) -> str:
    start = len(text) - len(text.lstrip())
    return _around(text, (start, start + len(text.strip())), marks)


def _around(text: str, span: tuple[int, int], marks: tuple[str, str]) -> str:
    start, stop = span
    return text[:start] + marks[0] + text[start:stop] + marks[1] + text[stop:] if start < stop else text


def unwrap(wrapped: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """The text without sentinels, and turn → (where its first words begin, where its last ones end).

    Templates may quote a turn again further down, as the name of the tool that answers: the first time counts.
    """
    found: dict[int, list[int]] = {}
    for mark, (count, match) in _first_of_each(enumerate(SENTINEL.finditer(wrapped))).items():
        found.setdefault((ord(mark) - FIRST_SENTINEL) // SENTINELS_A_TURN, []).append(match.start() - count)
    return SENTINEL.sub("", wrapped), {turn: (min(places), max(places)) for turn, places in found.items()}


def _first_of_each(matches: Iterable[tuple[int, re.Match[str]]]) -> dict[str, tuple[int, re.Match[str]]]:
    found: dict[str, tuple[int, re.Match[str]]] = {}
    for count, match in matches:
        found.setdefault(match.group(), (count, match))
    return found
