"""Preference pairs: a better and a worse answer to one prompt.

{"prompt", "chosen", "rejected"} as text or messages; without prompt, two whole conversations, two transcripts as hh-rlhf
writes them, or two texts with a common beginning; alpaca's {"instruction", "input", "chosen", "rejected"}, or its output
as [better, worse]; ShareGPT's {"conversations", "chosen", "rejected"}; LLaMA-Factory v1's chosen_messages and
rejected_messages. Answers that are whole conversations carry their prompt: a prompt beside them is not read.

By how much the better one is better: `margin`, or the difference of the two answers' scores.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from typing import Any

from tunesmith.data.formats.alpaca import INPUTS, alpaca_prompt
from tunesmith.data.formats.base import (
    CONVERSATIONS,
    OUTPUTS,
    ROLES,
    Format,
    Record,
    first_key,
    prompt_and_completion,
    show,
    text_of,
)
from tunesmith.data.formats.prompt_completion import is_chat
from tunesmith.data.formats.turns import (
    ROLE_KEYS,
    conversation,
    first_of,
    read_prompt,
    with_answer,
    with_system,
)
from tunesmith.errors import DataError
from tunesmith.errors import Path as ValuePath
from tunesmith.types import Example, Message, Piece, Place

ANSWERS = ("chosen", "rejected")
CONVERSATION_PAIR = ("chosen_messages", "rejected_messages")
SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
QUESTIONS = ("instruction", "question", *INPUTS)
"""Keys of a user's turn."""
TRANSCRIPT_START = "\n\nHuman:"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


class Preference(Format):
    keys = "chosen, rejected (and prompt, instruction or conversations)"

    @classmethod
    def matches(cls, record: Record) -> bool:
        return (
            ("chosen" in record and "rejected" in record)
            or ("chosen_messages" in record and "rejected_messages" in record)
            or ("instruction" in record and isinstance(_ranked_outputs(record), list))
        )

    def read(self, record: Record, place: Place) -> Example:
        better, worse = (self._side(record, side, place) for side in (0, 1))
        if _is_empty(better) and _is_empty(worse):
            raise DataError(place, _answer_path(record, 0), "both answers are empty", "remove the record")
        return replace(better, rejected=worse, margin=_margin(record, place))

    def _side(self, record: Record, side: int, place: Place) -> Example:
        """The better (0) or the worse (1) of the two examples."""
        path = _answer_path(record, side)
        answer = _answer(record, side, place)
        if isinstance(answer, list) and _holds_prompt(answer):
            return conversation(with_system(answer, record, place, path), record, place, path)
        prompt = record.get("prompt")
        turns, question = first_key(record, CONVERSATIONS), first_key(record, QUESTIONS)
        if turns and prompt is None:
            messages = with_system(record[turns], record, place, (turns,))
        elif question and prompt is None:
            messages = alpaca_prompt(record, place, question)
        elif is_chat(record, prompt, answer):
            messages = read_prompt(prompt, record, place, ("prompt",))
        else:
            return _read_texts(record, side, place)
        return conversation(with_answer(messages, answer, record, place, path), record, place, path)


def _margin(record: Record, place: Place) -> float | None:
    """By how much the better answer is better, where the record says so."""
    if record.get("margin") is not None:
        return _number(record, "margin", place)
    for better, worse in SCORES:
        if record.get(better) is not None and record.get(worse) is not None:
            return _number(record, better, place) - _number(record, worse, place)
    return None


def _number(record: Record, key: str, place: Place) -> float:
    value = record[key]
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):  # a .csv file has no other numbers
        value = float(value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(place, (key,), f"expected a number, found {show(value)}", "write a number, or leave it out")
    return float(value)


def _ranked_outputs(record: Record) -> Any:
    key = first_key(record, OUTPUTS)
    return record[key] if key else None


def _answer_path(record: Record, side: int) -> ValuePath:
    for keys in (ANSWERS, CONVERSATION_PAIR):
        if keys[side] in record:
            return (keys[side],)
    return (first_key(record, OUTPUTS) or OUTPUTS[0], side)


def _answer(record: Record, side: int, place: Place) -> Any:
    for keys in (ANSWERS, CONVERSATION_PAIR):
        if keys[side] in record:
            return record[keys[side]]
    outputs = _ranked_outputs(record)
    if not isinstance(outputs, list) or len(outputs) != 2:
        key = first_key(record, OUTPUTS) or OUTPUTS[0]
        raise DataError(place, (key,), f"expected two answers, found {show(outputs)}", "write [better, worse]")
    return outputs[side]


def _holds_prompt(answer: list[Any]) -> bool:
    """Whether a list of turns is a whole conversation: it does not begin with the assistant."""
    if not answer or not isinstance(answer[0], dict):
        return False
    key = first_of(answer[0], ROLE_KEYS)
    role = answer[0][key] if key else None
    return isinstance(role, str) and ROLES.get(role) in ("system", "user")


def _read_texts(record: Record, side: int, place: Place) -> Example:
    """A side of two texts: a transcript, the answer to a prompt, or what follows on their common beginning."""
    prompt = text_of(record.get("prompt"), place, ("prompt",))
    texts = [text_of(_answer(record, each, place), place, _answer_path(record, each)) for each in (0, 1)]
    if (prompt + texts[side]).startswith(TRANSCRIPT_START):
        return conversation(_read_transcript(prompt + texts[side]), record, place, _answer_path(record, side))
    if prompt:
        return prompt_and_completion(prompt, texts[side], place)
    start = _common_start(*texts)
    pieces = (Piece(texts[side][:start], learn=False), Piece(texts[side][start:], learn=True))
    return Example(place, pieces=pieces if start else pieces[1:])


def _read_transcript(text: str) -> list[Message]:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …". Two turns of one speaker are one: some break off in between."""
    _, *parts = SPEAKER.split(text)
    messages: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1].role == role:
            said = f"{messages.pop().content}\n\n{said.strip()}"
        messages.append(Message(role, said.strip()))
    return messages


def _common_start(first: str, second: str) -> int:
    """Length of the common beginning, cut back to before a white space, so that both sides go on with a whole word."""
    end = len(os.path.commonprefix([first, second]))  # noqa: RUF071 - characters are meant, not folders
    return max((match.start() for match in re.finditer(r"\s+", first[:end])), default=0)


def _is_empty(example: Example) -> bool:
    if example.pieces:
        return not example.pieces[-1].text
    last = example.messages[-1]
    return not (last.content or last.reasoning or last.tool_calls)
