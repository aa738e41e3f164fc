"""Line and column of a value in a data file, looked up only when an error about it is printed."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.errors import Path as ValuePath
from tunesmith.types import Place

DECODER = json.JSONDecoder()
SPACE = " \t\n\r"


def locate(place: Place, path: ValuePath) -> str:
    """`file:line:column` where that can be found, else `file:line`, or `file: record n`. Never raises."""
    from tunesmith.data.readers import kind_of, read_text

    kind = "" if "://" in place.file else kind_of(place.file)
    if kind in (".jsonl", ".ndjson", ".json") and Path(place.file).is_file():
        try:
            text = read_text(place.file)
            if kind == ".json":
                return f"{place.file}:{_line_and_column(text, _find(text, 0, (place.line - 1, *path)))}"
            start = _line_start(text, place.line)
            return f"{place.file}:{_line_and_column(text, _find(text, start, path))}"
        except (OSError, ValueError, IndexError):
            return f"{place.file}:{place.line}"
    if kind in (".parquet", ".arrow") or not kind:
        return f"{place.file}: record {place.line}"
    return f"{place.file}:{place.line}"


def _find(text: str, position: int, path: ValuePath) -> int:
    """Where the value at `path` begins; of its deepest part that is there, if not all is."""
    position = _skip(text, position)
    for part in path:
        inside = _member(text, position, part) if isinstance(part, str) else _item(text, position, part)
        if inside is None:
            break
        position = inside
    return position


def _member(text: str, position: int, key: str) -> int | None:
    """Where an object's member begins."""
    if text[position] != "{":
        return None
    position = _skip(text, position + 1)
    while text[position] != "}":
        name, position = DECODER.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)
        if name == key:
            return position
        position = _behind(text, position)
    return None


def _item(text: str, position: int, index: int) -> int | None:
    """Where an array's item begins."""
    if text[position] != "[":
        return None
    position = _skip(text, position + 1)
    while text[position] != "]":
        if index == 0:
            return position
        position, index = _behind(text, position), index - 1
    return None


def _behind(text: str, position: int) -> int:
    """Behind the value that begins here, and behind the comma after it."""
    position = _skip(text, DECODER.raw_decode(text, position)[1])
    return _skip(text, position + 1) if text[position] == "," else position


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in SPACE:
        position += 1
    return position


def _line_start(text: str, line: int) -> int:
    position = 0
    for _ in range(line - 1):
        position = text.index("\n", position) + 1
    return position


def _line_and_column(text: str, position: int) -> str:
    return f"{text.count(chr(10), 0, position) + 1}:{position - text.rfind(chr(10), 0, position)}"
