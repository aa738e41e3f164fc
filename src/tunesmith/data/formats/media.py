"""Images, audio and video in messages: content in parts, and placeholders in text with the files listed beside it."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from tunesmith.data.formats.base import Record, first_key, hint, show, text_of
from tunesmith.data.formats.tools import read_call
from tunesmith.errors import DataError
from tunesmith.errors import Path as ValuePath
from tunesmith.types import Media, Message, Place, ToolCall

Kind = Literal["image", "audio", "video"]
KINDS: dict[str, Kind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
}
"""Type of a content part → what it holds."""
TEXTS = ("text", "input_text", "output_text")
THOUGHTS = ("reasoning", "thinking")
LISTS: dict[str, Kind] = {"images": "image", "audios": "audio", "videos": "video"}
"""Key of the record's list of files → what they are."""
SOURCES = ("path", "url", "base64", "bytes", "data", "value")
"""Keys under which the file of a part may stand, besides the part's own type; the first that is not null counts."""
PLACEHOLDER = re.compile("<(image|audio|video)>")
LISTED = ""
"""Source of a part that takes the next file from the record's list."""

Content = str | tuple[str | Media, ...]


def read_parts(
    parts: list[Any], place: Place, path: ValuePath, record: Record
) -> tuple[Content, str, tuple[ToolCall, ...]]:
    """Content, reasoning and tool calls of content in parts. Text between two media becomes one string."""
    content: list[str | Media] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for index, part in enumerate(parts):
        here = (*path, index)
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXTS or isinstance(part, str):
            content.append(part if isinstance(part, str) else text_of(*_value(part, ("text", "value"), place, here)))
        elif kind in THOUGHTS:
            reasoning.append(text_of(*_value(part, (kind, "value", "text"), place, here)))
        elif kind == "tool_call":
            calls.append(read_call(*_value(part, ("value", "tool_call"), place, here)))
        elif isinstance(kind, str) and kind in KINDS:
            content.append(_read_media(part, KINDS[kind], place, here, record))
        elif not isinstance(part, dict) or "type" not in part:
            what = f"expected a content part with a type, found {show(part)}"
            raise DataError(place, here, what, 'write {"type": "text", "text": "…"}')
        else:
            known = (*TEXTS[:1], *THOUGHTS, "tool_call", *KINDS)
            raise DataError(place, (*here, "type"), f"unknown type of content {kind!r}", hint(kind, known))
    return join_texts(content), "\n".join(reasoning), tuple(calls)


def _value(part: Record, keys: Sequence[str], place: Place, path: ValuePath) -> tuple[Any, Place, ValuePath]:
    """The value under the first of the keys that is not null, its place and its path."""
    key = next((key for key in keys if part.get(key) is not None), first_key(part, keys))
    if key is not None:
        return part[key], place, (*path, key)
    raise DataError(place, path, f"content of type {part['type']} without {keys[0]}", f"add {keys[0]}")


def join_texts(parts: Sequence[str | Media]) -> Content:
    """Parts with neighbouring texts joined; a plain string where all is text."""
    if all(isinstance(part, str) for part in parts):
        return "".join(part for part in parts if isinstance(part, str))
    joined: list[str | Media] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return tuple(joined)


def _read_media(part: Record, kind: Kind, place: Place, path: ValuePath, record: Record) -> Media:
    for key in (part["type"], kind, *SOURCES):
        if part.get(key) is not None:
            return media_of(part[key], kind, place, (*path, key))
    if record.get(f"{kind}s") is None:
        what = f"no file for this {kind}"
        raise DataError(place, path, what, f'add its path, as in {{"type": "{kind}", "path": "…"}}, or a list {kind}s')
    return Media(kind, LISTED)


def media_of(value: Any, kind: Kind, place: Place, path: ValuePath) -> Media:
    """A path, the file's bytes, a data: address, or an object that holds one of these."""
    if isinstance(value, dict):
        # Hub data sets hold {"bytes", "path"}: where there are bytes, the path is only a name.
        for key in ("bytes", *SOURCES):
            if value.get(key) is not None:
                if key == "data" and isinstance(value[key], str):  # OpenAI's input_audio: bare base64
                    return Media(kind, _decode(value[key], place, (*path, key)))
                return media_of(value[key], kind, place, (*path, key))
    if isinstance(value, bytes) and value:
        return Media(kind, value)
    if not isinstance(value, str) or not value:
        what = f"expected the path of an {kind} file" if kind != "video" else "expected the path of a video file"
        raise DataError(place, path, f"{what}, found {show(value)}", "write it as a string")
    if path[-1] == "base64":
        return Media(kind, _decode(value, place, path))
    scheme, colon, rest = value.partition(":")
    if not colon or len(scheme) < 2:  # one letter is a drive
        return Media(kind, value)
    if scheme == "data":
        return Media(kind, _decode(rest.partition(",")[2], place, path))
    if scheme == "file":
        return Media(kind, rest.removeprefix("//"))
    if rest.startswith("//"):
        raise DataError(place, path, f"a web address, {show(value)}", "download the file and write its path here")
    return Media(kind, value)


def _decode(text: str, place: Place, path: ValuePath) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(place, path, "not valid base64", "write the file's path, or encode it again") from error
    if not data:
        raise DataError(place, path, "an empty file in base64", "write the file's path, or encode it again")
    return data


def has_lists(record: Record) -> bool:
    """Whether files are listed beside the text."""
    return "images" in record or "audios" in record or "videos" in record


def fill_placeholders(messages: list[Message], record: Record, place: Place) -> list[Message]:
    """Put the files of the record's lists where <image>, <audio> and <video> stand in the text. Counts must agree."""
    files: dict[Kind, list[Media]] = {}
    for key, kind in LISTS.items():
        value = record.get(key)
        if value is not None:
            paths = [((key, i), v) for i, v in enumerate(value)] if isinstance(value, list) else [((key,), value)]
            files[kind] = [media_of(v, kind, place, path) for path, v in paths]
    if not files:
        return messages
    used = dict.fromkeys(files, 0)
    filled = [replace(m, content=_fill(m.content, files, used)) for m in messages]
    for kind, listed in files.items():
        if used[kind] != len(listed):
            what = (
                f"{used[kind]} × <{kind}> in the text, but {len(listed)} {'file' if len(listed) == 1 else 'files'} here"
            )
            raise DataError(place, (f"{kind}s",), what, f"write <{kind}> once where each of the files belongs")
    return filled


def _fill(content: Content, files: dict[Kind, list[Media]], used: dict[Kind, int]) -> Content:
    def next_file(kind: Kind) -> Media:
        used[kind] += 1
        listed = files[kind]
        return listed[used[kind] - 1] if used[kind] <= len(listed) else Media(kind, LISTED)  # the count tells

    filled: list[str | Media] = []
    for part in (content,) if isinstance(content, str) else content:
        if isinstance(part, Media):
            filled.append(part if part.source != LISTED else next_file(part.kind))
            continue
        end = 0
        for match in PLACEHOLDER.finditer(part):
            kind: Kind = match.group(1)  # type: ignore[assignment]  # what the pattern allows
            if kind in files:
                filled += [part[end : match.start()], next_file(kind)]
                end = match.end()
        filled.append(part[end:])
    return join_texts(filled)


def refuse_lists(record: Record, place: Place) -> None:
    """Raises DataError where a record of plain text lists files: nothing can say where they belong."""
    for key, kind in LISTS.items():
        if record.get(key):
            remedy = f"write the text as messages, with <{kind}> where each file belongs"
            raise DataError(place, (key,), f"{key} beside plain text", remedy)
