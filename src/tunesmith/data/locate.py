"""Line and column of a value in a data file, looked up only when an error about it is printed."""

from __future__ import annotations

import os
from array import array
from functools import lru_cache
from itertools import islice

from tunesmith.data.csv_text import Table
from tunesmith.data.json_text import find, items, line_and_column, skip_space
from tunesmith.data.readers import DELIMITERS, kind_of, open_bytes, read_text
from tunesmith.errors import Path as ValuePath
from tunesmith.types import Place

LINE_KINDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
"""Kinds of files whose places are lines."""


def locate(place: Place, path: ValuePath) -> str:
    """`file:line:column` where that can be found, else `file:line`, or `file: record n`. Never raises.

    Of a path that leads nowhere the deepest part is found. Files behind URLs are not opened.
    """
    file, kind = place.file, kind_of(place.file)
    is_line = kind in LINE_KINDS and not file.startswith("hub:")
    roughly = str(place) if is_line else f"{file}: record {place.line}"
    if kind not in FINDERS or not os.path.isfile(file):
        return roughly
    try:
        return f"{file}:{FINDERS[kind](file, place.line, path)}"
    except Exception:  # the file may have changed since it was read; a message about an error must not become one
        return roughly


def _in_jsonl(file: str, line: int, path: ValuePath) -> str:
    with open_bytes(file) as stream:
        text = next(islice(stream, line - 1, None)).decode()
    return line_and_column(text.removeprefix("\ufeff"), find(text.removeprefix("\ufeff"), 0, path), line)


def _in_json(file: str, record: int, path: ValuePath) -> str:
    facts = os.stat(file)
    start = _record_starts(file, facts.st_size, facts.st_mtime_ns)[record - 1]
    text = read_text(file)
    return line_and_column(text, find(text, start, path))


@lru_cache(maxsize=4)
def _record_starts(file: str, size: int, changed_ns: int) -> array[int]:
    """Where the records of a .json file begin; kept, as one error seldom comes alone. A broken end does not matter."""
    text, starts = read_text(file), array("q")
    try:
        starts.extend(items(text, skip_space(text, 0)))
    except (ValueError, IndexError, RecursionError):
        return starts
    return starts


def _in_csv(file: str, line: int, path: ValuePath) -> str:
    with open_bytes(file) as stream:
        table = Table(stream, DELIMITERS[kind_of(file)])
        row = next(row for row in table if row.line == line)
    name = path[0] if path else None
    start = row.start(table.header.index(name), table.delimiter) if name in table.header else 0
    return line_and_column(row.raw, start, line)


FINDERS = {".jsonl": _in_jsonl, ".ndjson": _in_jsonl, ".json": _in_json, ".csv": _in_csv, ".tsv": _in_csv}
