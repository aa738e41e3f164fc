"""JSON with positions: a strict decoder, what is wrong with text that it refuses, and where a value stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

from tunesmith.errors import Path

Object = dict[str, Any]
WHITE = re.compile(r"[ \t\n\r]*")
COMMA_BEFORE_END = re.compile(r",[ \t\n\r]*([\]}])")
HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""How half a surrogate pair is spelt. Most come in pairs, which is right."""
WORD = re.compile(r"[\w+.-]+")
PYTHON_WORDS = ("True", "False", "None")
MAX_DIGITS = 4300
"""Python reads no longer integers."""


class Flaw(NamedTuple):
    """What is wrong with a text, and where."""

    position: int
    what: str
    remedy: str


def _object(pairs: list[tuple[str, Any]]) -> Object:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key twice")
    return made


def _constant(name: str) -> NoReturn:
    raise ValueError(name)


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)
"""Reads whatever has JSON's form: to find where a value ends."""


def skip_space(text: str, position: int) -> int:
    """The position of what follows the white space."""
    match = WHITE.match(text, position)
    assert match is not None
    return match.end()


def line_and_column(text: str, position: int, first_line: int = 1) -> str:
    """`line:column` of a position, both counted from 1; the text begins on `first_line`."""
    line = first_line + text.count("\n", 0, position)
    return f"{line}:{position - text.rfind(chr(10), 0, position)}"


def lone_half(text: str, start: int, stop: int, value: Any) -> Flaw | None:
    """Half a surrogate pair in a value that is spelt at text[start:stop]: no character, and no tokenizer takes it."""
    if not HALF.search(text, start, stop):
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return first_flaw(text, start)
    return None


def explain(text: str, start: int, error: ValueError | RecursionError, remedy: str) -> Flaw:
    """What is wrong with a value that STRICT refused. `remedy`: what to say where nothing more exact is known."""
    if isinstance(error, RecursionError):
        return Flaw(start, "not JSON: nested too deeply", remedy)
    if not isinstance(error, json.JSONDecodeError):
        return first_flaw(text, start) or Flaw(start, f"not JSON: {error}", remedy)
    position = error.pos
    behind_comma = text.rfind(",", start, position) if text[position : position + 1] in ("}", "]") else position
    if comma := COMMA_BEFORE_END.match(text, max(behind_comma, 0)):
        return Flaw(comma.start(), f"not JSON: a comma before the closing {comma[1]}", "remove it")
    rest = text[position : position + 6]
    if rest.startswith("'"):
        remedy = "write strings in double quotes"
    elif word := next((word for word in PYTHON_WORDS if rest.startswith(word)), None):
        remedy = f"write {word.lower() if word != 'None' else 'null'} for {word}"
    elif error.msg.startswith("Invalid control character"):
        remedy = r"write a line break in a string as \n, a tab as \t"
    elif error.msg.startswith("Invalid \\escape"):
        remedy = r"write a backslash as \\"
    return Flaw(position, f"not JSON: {error.msg.rstrip(': ')}", remedy)


def first_flaw(text: str, position: int) -> Flaw | None:
    """The first thing in a value that has JSON's form but that no record may hold."""
    if text[position] == "{":
        seen = set()
        for key, at, value in members(text, position):
            if key in seen:
                return Flaw(at, f"the key {json.dumps(key)} stands twice in one object", "remove one of the two")
            seen.add(key)
            if flaw := _half_in(key, at) or first_flaw(text, value):
                return flaw
        return None
    if text[position] == "[":
        return next((flaw for at in items(text, position) if (flaw := first_flaw(text, at))), None)
    if text[position] == '"':
        return _half_in(LENIENT.raw_decode(text, position)[0], position)
    match = WORD.match(text, position)
    word = match[0] if match else ""
    if "N" in word or "I" in word:
        return Flaw(position, f"{word} is no JSON", "write a number, or null")
    if len(word.lstrip("-")) > MAX_DIGITS and word.lstrip("-").isdigit():
        return Flaw(position, f"a number of {len(word.lstrip('-'))} digits", "write it as a string")
    return None


def _half_in(value: str, position: int) -> Flaw | None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        what = f"character {error.start + 1} of the string is half of a surrogate pair ({half})"
        return Flaw(position, what, "write the whole pair, or remove it")
    return None


def find(text: str, position: int, path: Path) -> int:
    """Where the value at `path` begins, inside the value at `position`; or its deepest part that is there."""
    position = skip_space(text, position)
    for part in path:
        if isinstance(part, str) and text[position] == "{":
            found = next((value for key, _, value in members(text, position) if key == part), None)
        elif isinstance(part, int) and text[position] == "[":
            found = next((at for index, at in enumerate(items(text, position)) if index == part), None)
        else:
            found = None
        if found is None:
            break
        position = found
    return position


def members(text: str, position: int) -> Iterator[tuple[str, int, int]]:
    """(key, its position, its value's position) of the object that begins at `position`."""
    position = skip_space(text, position + 1)
    while text[position] != "}":
        at = position
        key, position = LENIENT.raw_decode(text, position)
        position = skip_space(text, skip_space(text, position) + 1)
        yield key, at, position
        position = _behind(text, position)


def items(text: str, position: int) -> Iterator[int]:
    """Positions of the items of the array that begins at `position`."""
    position = skip_space(text, position + 1)
    while text[position] != "]":
        yield position
        position = _behind(text, position)


def _behind(text: str, position: int) -> int:
    """Behind the value that begins here, and behind the comma after it."""
    position = skip_space(text, LENIENT.raw_decode(text, position)[1])
    return skip_space(text, position + 1) if text[position] == "," else position
