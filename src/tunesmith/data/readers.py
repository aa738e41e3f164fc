"""Files to records: one reader for each kind of file. A bad line is reported and reading goes on with the next."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from tunesmith.config import SetConfig
from tunesmith.errors import UserError

Report = Callable[[UserError, str | None], None]
"""Told what is wrong, and the record's raw text if there is one, for quarantine."""

Records = Iterator[tuple[dict[str, Any], int]]
"""(record, 1-based line, or record number where a file has no lines)."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SURROGATE = re.compile("[\ud800-\udfff]")


def raise_error(error: UserError, raw: str | None = None) -> NoReturn:
    """The report that stops at the first error."""
    raise error


def kind_of(file: str) -> str:
    """The suffix that tells a file's kind, without that of its compression."""
    suffixes = [suffix.lower() for suffix in Path(file.partition("?")[0]).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(file: str, config: SetConfig, report: Report) -> Records:
    """The records of a local file or URL. Raises UserError where the file as a whole cannot be read."""
    import pyarrow

    try:
        yield from READERS[kind_of(file)](file, config, report)
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file}: cannot be read: {reason}: check the file, or copy it again") from error


def open_bytes(file: str) -> BinaryIO:
    """The bytes of a local file or URL, decompressed."""
    compression = COMPRESSIONS.get(Path(file).suffix.lower())
    raw: Any
    if "://" in file:
        import fsspec

        raw = fsspec.open(file, "rb").open()
    else:
        raw = Path(file).expanduser().open("rb")
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(raw))
    if compression == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"), 2**20)  # type: ignore[type-var]
    return cast(BinaryIO, raw)


def read_text(file: str) -> str:
    """All of a text file. Raises UserError that names the line where it is no UTF-8."""
    with open_bytes(file) as stream:
        data = stream.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 text (byte {error.start}): save the file as UTF-8") from error


class _Mistake(ValueError):
    """JSON that is valid but holds what no record may hold."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Mistake(f"the key {twice!r} stands twice in one object: remove one of the two")
    return record


def _constant(name: str) -> NoReturn:
    raise _Mistake(f"{name} is no JSON: write a number, or null")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _jsonl(file: str, config: SetConfig, report: Report) -> Records:
    with open_bytes(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raw = line.decode(errors="backslashreplace").rstrip("\r\n")
                report(UserError(f"{file}:{number}: not UTF-8 text (byte {error.start}): save the file as UTF-8"), raw)
                continue
            hint = " (a whole JSON array? name the file .json)" if number == 1 and text.startswith("[") else ""
            try:
                record, end = DECODER.raw_decode(text)
                if text[end:].strip():
                    raise json.JSONDecodeError("Extra data", text, end)
            except _Mistake as mistake:
                report(UserError(f"{file}:{number}: {mistake}"), text)
                continue
            except json.JSONDecodeError as error:
                what = f"{file}:{number}:{error.pos + 1}: not JSON: {error.msg}"
                report(UserError(f"{what}: one object per line is expected{hint}"), text)
                continue
            except RecursionError:
                report(
                    UserError(f"{file}:{number}: not JSON: nested too deeply: one object per line is expected"), text
                )
                continue
            if (problem := _unusable(record, text)) is not None:
                report(UserError(f"{file}:{number}: {problem}{hint}"), text)
                continue
            yield record, number


def _unusable(record: Any, text: str) -> str | None:
    """Why a JSON value is no record."""
    if not isinstance(record, dict):
        return f"expected an object with keys, found {_name(record)}: write each record as {{…}}"
    if "\\u" in text and SURROGATE.search(json.dumps(record, ensure_ascii=False)):
        return "text that is no Unicode (half a surrogate pair, \\ud800 … \\udfff): remove it"
    return None


def _name(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _json(file: str, config: SetConfig, report: Report) -> Records:
    text = read_text(file)
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        place = _place(text, position)
        found = "an object" if text[position : position + 1] == "{" else "no array"
        remedy = "one object per line? name the file .jsonl; records under a key? write them as the array itself"
        raise UserError(f"{file}:{place}: expected a JSON array of records, found {found}: {remedy}")
    position, number = _skip_space(text, position + 1), 0
    while text[position : position + 1] != "]":
        number += 1
        try:
            start = position
            record, position = DECODER.raw_decode(text, position)
            position = _skip_space(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except _Mistake as mistake:
            report(UserError(f"{file}:{_place(text, start)}: record {number}: {mistake}"), None)
            return
        except json.JSONDecodeError as error:
            place = _place(text, error.pos)
            report(UserError(f"{file}:{place}: not JSON: {error.msg}: mend it; what follows is not read"), None)
            return
        except RecursionError:
            report(UserError(f"{file}:{_place(text, start)}: not JSON: nested too deeply: mend it"), None)
            return
        if (problem := _unusable(record, text[start:position])) is not None:
            report(UserError(f"{file}:{_place(text, start)}: {problem}"), text[start:position])
        else:
            yield record, number
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    if rest := text[position + 1 :].strip():
        what = f"not JSON: text behind the array: {rest[:20]!r}"
        report(UserError(f"{file}:{_place(text, text.index(rest, position + 1))}: {what}: remove it"), None)


WHITE = re.compile(r"[ \t\n\r]*")


def _skip_space(text: str, position: int) -> int:
    match = WHITE.match(text, position)
    assert match is not None
    return match.end()


def _place(text: str, position: int) -> str:
    """line:column of a position."""
    return f"{text.count(chr(10), 0, position) + 1}:{position - text.rfind(chr(10), 0, position)}"


def _csv(file: str, config: SetConfig, report: Report) -> Records:
    tabs = kind_of(file) == ".tsv"
    # in real .tsv files a quotation mark is a quotation mark
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    with open_bytes(file) as stream:
        lines = _decoded_lines(file, stream, report)
        reader = csv.reader(lines, **options)
        header = next(reader, None)
        if header is None:
            return
        if wrong := [name for name in header if not name or header.count(name) > 1]:
            what = "an empty column name" if not wrong[0] else f"the column {wrong[0]!r} twice"
            raise UserError(f"{file}:1: {what} in the header: give every column a name of its own")
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                report(
                    UserError(f"{file}:{line}: not {'TSV' if tabs else 'CSV'}: {error}: mend the line's quotes"), None
                )
                continue
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(header):
                what = f"{len(row)} fields, but the header has {len(header)}"
                report(
                    UserError(f"{file}:{line}: {what}: mend the line, or quote fields that hold separators"), str(row)
                )
                continue
            yield dict(zip(header, row, strict=True)), line


def _decoded_lines(file: str, stream: BinaryIO, report: Report) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            message = f"{file}:{number}: not UTF-8 text (byte {error.start}): save the file as UTF-8"
            report(UserError(message), line.decode(errors="backslashreplace").rstrip("\r\n"))


def _parquet(file: str, config: SetConfig, report: Report) -> Records:
    import pyarrow.parquet

    number = 0
    with open_bytes(file) as stream:
        for part in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024):
            for record in part.to_pylist():
                number += 1
                yield record, number


def _arrow(file: str, config: SetConfig, report: Report) -> Records:
    """Both of Arrow's own forms: the file, and the stream that `datasets` writes."""
    import pyarrow.ipc

    number = 0
    with open_bytes(file) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        parts: Any
        if is_file:
            opened = pyarrow.ipc.open_file(stream)
            parts = (opened.get_batch(index) for index in range(opened.num_record_batches))
        else:
            parts = pyarrow.ipc.open_stream(stream)
        for part in parts:
            for record in part.to_pylist():
                number += 1
                yield record, number


def _txt(file: str, config: SetConfig, report: Report) -> Records:
    if config.text_unit == "file":
        text = read_text(file)
        if text.strip():
            yield {"text": text.replace("\r\n", "\n")}, 1
        return
    with open_bytes(file) as stream:
        paragraph: list[str] = []
        number = first = 0
        for number, raw in enumerate(_decoded_lines(file, stream, report), start=1):
            line = raw.removesuffix("\n").removesuffix("\r")
            if config.text_unit == "line":
                if line.strip():
                    yield {"text": line}, number
            elif line.strip():
                first = first if paragraph else number
                paragraph.append(line)
            elif paragraph:
                yield {"text": "\n".join(paragraph)}, first
                paragraph = []
        if paragraph:
            yield {"text": "\n".join(paragraph)}, first


READERS: dict[str, Callable[[str, SetConfig, Report], Records]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _txt,
}
