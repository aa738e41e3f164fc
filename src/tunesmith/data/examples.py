"""Records to examples: renamed columns, the record's form found and read, conversations and plain text made of each other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.config import SetConfig
from tunesmith.data.formats import Format, check_format, find_format
from tunesmith.data.formats.base import Record, nearest
from tunesmith.data.sources import Report, Source, find_sources, raise_error, read_records
from tunesmith.errors import DataError
from tunesmith.types import Example, Media, Message, Piece, Place

OPTIONAL = ("system", "tools", "images", "audios", "videos", "history", "input")
"""Keys that a record may lack even where `columns` names their column, once some record has had it."""


def read_examples(source: Source, as_chat: bool | None = None, report: Report = raise_error) -> Iterator[Example]:
    """The examples of a data set. All its records have one form, found on the first that can be read.

    `as_chat`: as in DataConfig. A record that cannot be used goes to `report` with its JSON, and reading goes on.
    """
    columns = source.config.columns
    form: Format | None = None
    for record, place in read_records(source, report):
        try:
            renamed = rename(record, columns, place, lenient=form is not None) if columns else record
            if source.transform is not None:
                renamed = source.transform(renamed)
            if form is None:
                found = find_format(source.config, renamed, place)
            else:
                check_format(found, renamed, place)
            example = found.read(renamed, place)
            if as_chat is not None:
                example = to_chat(example) if as_chat else to_text(example)
        except DataError as error:
            if error.path and error.path[0] in columns:  # the file has the column's name, not ours
                path = (columns[str(error.path[0])], *error.path[1:])
                error = DataError(error.place, path, error.what, error.remedy)
            report(error, json.dumps(record, ensure_ascii=False, default=str))
            continue
        form = found
        folder = os.path.dirname(place.file)
        # The example was made here and nobody holds it yet: writing into it is six times as fast as dataclasses.replace.
        example.__dict__["columns"] = tuple(record)
        if folder:
            for part in (example, example.rejected):
                if part is not None:
                    part.__dict__["folder"] = folder
        yield example


def examples_at(path: str, setting: str = "the path", split: str = "train") -> Iterator[Example]:
    """The examples of a data set that is named by its path alone."""
    for source in find_sources(SetConfig(path=path), setting, split):
        yield from read_examples(source)


def rename(record: Record, columns: Mapping[str, str], place: Place, lenient: bool = False) -> Record:
    """The record under the keys that the formats know. `lenient`: an optional column may be missing."""
    taken = set(columns.values())
    renamed = {key: value for key, value in record.items() if key not in taken}
    for key, column in columns.items():
        if column in record:
            renamed[key] = record[column]
        elif not (lenient and key in OPTIONAL):
            what = f"no column {column}, which data.columns names for {key}, among {', '.join(record)}"
            raise DataError(place, (), what, nearest(column, record) or "name one of these")
    return renamed


def to_chat(example: Example) -> Example:
    """A prompt and its completion as two turns. Plain text without a prompt stays what it is."""
    rejected = example.rejected and to_chat(example.rejected)
    if len(example.pieces) != 2:
        return replace(example, rejected=rejected)
    messages = tuple(Message(role, p.text) for role, p in zip(("user", "assistant"), example.pieces, strict=True))
    return replace(example, messages=messages, pieces=(), rejected=rejected)


def to_text(example: Example) -> Example:
    """A conversation as plain text: its turns in lines, of which the assistant's are learnt. Raises DataError."""
    rejected = example.rejected and to_text(example.rejected)
    pieces = list(example.pieces)
    for index, message in enumerate(example.messages):
        text = "\n".join(part for part in (message.reasoning, _text(message, example.place)) if part)
        is_answer = message.role == "assistant"
        if message.weight not in (None, 0, 1):
            raise _no_text(example.place, "loss weights other than 0 and 1")
        learn = is_answer if message.weight is None else message.weight > 0
        for piece in (Piece("\n" * bool(index), False), Piece(text, learn)):
            if pieces and pieces[-1].learn == piece.learn:
                pieces[-1] = Piece(pieces[-1].text + piece.text, piece.learn)
            elif piece.text:
                pieces.append(piece)
    if example.tools:
        raise _no_text(example.place, "tools")
    return replace(example, messages=(), pieces=tuple(pieces), rejected=rejected)


def _text(message: Message, place: Place) -> str:
    if message.tool_calls:
        raise _no_text(place, "tool calls")
    if not isinstance(message.content, str):
        raise _no_text(place, "images, audio and video")
    return message.content


def _no_text(place: Place, what: str) -> DataError:
    return DataError(place, (), f"plain text cannot hold {what}", "leave data.as_chat unset, or set it to true")


def content_hash(example: Example) -> int:
    """64 bits of all that is content: the same for the same example in another file or line."""
    text = json.dumps(_content(example), ensure_ascii=False, default=_digest)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _content(example: Example) -> list[Any]:
    """The example as lists, which JSON tells apart whatever their texts hold."""
    messages: list[Any] = []
    for m in example.messages:
        plain = not (m.reasoning or m.tool_calls or m.name or m.call_id) and m.weight is None
        if plain and isinstance(m.content, str):
            messages.append((m.role, m.content))
            continue
        parts = m.content if isinstance(m.content, str) else [_part(part) for part in m.content]
        calls = [(call.name, call.arguments, call.id) for call in m.tool_calls]
        messages.append((m.role, parts, m.reasoning, calls, m.name, m.call_id, m.weight))
    content = [
        messages,
        [(piece.text, piece.learn) for piece in example.pieces],
        example.tools,
        example.rejected and _content(example.rejected),
        example.desirable,
        example.answer,
        example.choices,
    ]
    return [*content, example.steps] if example.steps else content  # other examples keep the hashes that they have had


def _part(part: str | Media) -> Any:
    return part if isinstance(part, str) else (part.kind, part.source)


def _digest(value: Any) -> Any:
    """What JSON has no word for: bytes of media, and what a parquet file may hold in a tool's arguments."""
    return {"bytes": hashlib.blake2b(value).hexdigest()} if isinstance(value, bytes) else repr(value)


def media_path(folder: str, source: str) -> Path | None:
    """The file that `source` names: from `folder` or from up to two folders above it, also without its first folder.

    LLaMA-Factory counts from its own data folder, or from the folder that holds that one.
    """
    path = Path(source).expanduser()
    if path.is_absolute():
        return path if path.is_file() else None
    start = Path(folder).absolute()
    for base in (start, *start.parents[:2]):
        for relative in (path, Path(*path.parts[1:])) if len(path.parts) > 1 else (path,):
            if (base / relative).is_file():
                return base / relative
    return None
