"""Files to records: one reader for each kind of file. A bad record is reported, and reading goes on with the next."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import PurePath
from typing import Any, BinaryIO, NoReturn, cast

from tunesmith.config import SetConfig
from tunesmith.data.csv_text import Lines, Row, Table, bad_byte, shown_bytes
from tunesmith.data.json_text import HALF, LENIENT, STRICT, Flaw, explain, line_and_column, lone_half, skip_space
from tunesmith.errors import DataError, UserError
from tunesmith.types import Place

Report = Callable[[UserError, str | None], None]
"""Told what is wrong, and the record's raw text if there is one, for quarantine."""

Records = Iterator[tuple[dict[str, Any], int]]
"""(record, 1-based line, or record number where a file has no lines)."""

COMPRESSIONS = (".gz", ".zst")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TOO_MANY_FIELDS = {".csv": 'a field that holds commas stands in "quotation marks"', ".tsv": "remove tabs inside fields"}
ONE_A_LINE = "one object per line is expected"
UNCLOSED = "not JSON: the file ends inside its array", "copy it again, or close the array with ]"
NO_COMMA = "not JSON: no comma between two records", "write one; nothing after it is read"
LINE_ENDS = ("\n", "", "\r\n")
BATCH_ROWS = 256
BUFFER_BYTES = 2**20

LFS_POINTER = b"version https://git-lfs"
FOREIGN = {
    LFS_POINTER: ("a Git LFS pointer, not the file itself", "run git lfs pull"),
    b"\x1f\x8b": ("compressed with gzip", "end its name in .gz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "end its name in .zst"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1": ("a parquet file", "end its name in .parquet"),
    b"ARROW1": ("an arrow file", "end its name in .arrow"),
    b"\xff\xfe": ("UTF-16 text", "save the file as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save the file as UTF-8"),
}
"""First bytes of files that are no text in UTF-8 → what they are, and what to do."""


class BadRecord(DataError):
    """A record that cannot be read; where it stands in the file is known already."""

    def __init__(self, place: Place, at: str, what: str, remedy: str) -> None:
        super().__init__(place, (), what, remedy)
        self.args = (place, at, what, remedy)
        self.at = at

    def __str__(self) -> str:
        return f"{self.place.file}:{self.at}: {self.what}: {self.remedy}"


def raise_error(error: UserError, raw: str | None = None) -> NoReturn:
    """The report that stops at the first error."""
    raise error


def kind_of(file: str) -> str:
    """The suffix that tells a file's kind: of text that before .gz or .zst."""
    suffixes = ["", *_suffixes(file)]
    return suffixes[-2] if suffixes[-1] in COMPRESSIONS and suffixes[-2] in TEXT_READERS else suffixes[-1]


def _suffixes(file: str) -> list[str]:
    if file.startswith(("http://", "https://")):
        file = file.partition("?")[0].partition("#")[0]
    return [suffix.lower() for suffix in PurePath(file).suffixes]


def readable() -> str:
    """All suffixes, for messages."""
    binary = " and ".join(kind for kind in READERS if kind not in TEXT_READERS)
    return f"{', '.join(TEXT_READERS)} (each also with {' or '.join(COMPRESSIONS)} behind it), {binary}"


def read_file(file: str, config: SetConfig, report: Report) -> Records:
    """The records of a local file or URL. Raises UserError where the file as a whole cannot be read."""
    try:
        yield from READERS[kind_of(file)](file, config, report)
    except UserError:
        raise
    except Exception as error:  # damaged binary files and the packages behind URLs raise whatever they like
        raise UserError(f"{file}: cannot be read: {reason(error)}: check the file, or copy it again") from error


def reason(error: Exception) -> str:
    """What another library says, in a line."""
    said = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    return said[:200] or type(error).__name__


@contextmanager
def open_bytes(file: str) -> Iterator[BinaryIO]:
    """The bytes of a local file or URL, decompressed. Raises UserError for text that is none."""
    kind, packed = kind_of(file), _suffixes(file)[-1:]
    with ExitStack() as stack:
        stream: Any
        if "://" in file:
            import fsspec

            stream = io.BufferedReader(stack.enter_context(fsspec.open(file, "rb")), BUFFER_BYTES)
        else:
            stream = stack.enter_context(open(file, "rb", BUFFER_BYTES))
        if kind in TEXT_READERS and packed == [".gz"]:
            stream = io.BufferedReader(stack.enter_context(gzip.GzipFile(fileobj=stream)), BUFFER_BYTES)
        elif kind in TEXT_READERS and packed == [".zst"]:
            import pyarrow

            unpacked: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
            stream = io.BufferedReader(unpacked, BUFFER_BYTES)
        start = stream.peek(32)
        for magic, (what, remedy) in FOREIGN.items():
            if start.startswith(magic) and (kind in TEXT_READERS or magic == LFS_POINTER):
                raise UserError(f"{file}: {what}: {remedy}")
        yield cast(BinaryIO, stream)


def read_text(file: str) -> str:
    """All of a text file, with the bytes that are no UTF-8 as lone surrogates."""
    with open_bytes(file) as stream:
        return stream.read().decode(errors="surrogateescape").removeprefix("\ufeff")


# ---- JSON


def _jsonl(file: str, config: SetConfig, report: Report) -> Records:
    decode = STRICT.raw_decode
    with open_bytes(file) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode()
                record, end = decode(text)
            except (ValueError, RecursionError):
                end = 0
            if (
                end
                and type(record) is dict
                and text[end:] in LINE_ENDS
                and ("\\u" not in text or not HALF.search(text))
            ):
                yield record, number
            elif not line.isspace():
                text = line.decode(errors="surrogateescape").rstrip("\r\n")
                text = text.removeprefix("\ufeff") if number == 1 else text
                record, flaw = _only_object(text, array_hint=number == 1)
                if flaw is None:
                    yield record, number
                else:
                    at = line_and_column(text, flaw.position, number)
                    report(BadRecord(Place(file, number), at, flaw.what, flaw.remedy), shown_bytes(text))


def _only_object(text: str, array_hint: bool) -> tuple[Any, Flaw | None]:
    """The one record that a text holds, or what is wrong with it."""
    if flaw := bad_byte(text):
        return None, flaw
    start = skip_space(text, 0)
    record, end, flaw = _object_at(text, start, ONE_A_LINE)
    behind = len(text) if end is None else skip_space(text, end)
    if behind < len(text) and not flaw:
        flaw = explain(text, start, json.JSONDecodeError("Extra data", text, behind), ONE_A_LINE)
    if flaw and array_hint and text.startswith("[", start):
        flaw = flaw._replace(remedy=f"{flaw.remedy} (a whole JSON array? name the file .json)")
    return record, flaw


def _object_at(text: str, start: int, remedy: str) -> tuple[Any, int | None, Flaw | None]:
    """The record that begins here, its end, and what is wrong with it. No end: it has not the form of JSON."""
    try:
        record, end = STRICT.raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError) as error:
        return None, None, explain(text, start, error, remedy)
    except ValueError as error:
        flaw = explain(text, start, error, remedy)
        try:  # what is refused may stand before a fault of form
            return None, LENIENT.raw_decode(text, start)[1], flaw
        except (json.JSONDecodeError, RecursionError):
            return None, None, flaw
    if not isinstance(record, dict):
        return None, end, Flaw(start, f"expected an object with keys, found {_name(record)}", "write a record as {…}")
    return record, end, lone_half(text, start, end, record)


def _name(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]


def _json(file: str, config: SetConfig, report: Report) -> Records:
    text = read_text(file)
    if not text.strip():
        return
    if flaw := bad_byte(text) or _no_array(text):
        raise UserError(f"{file}:{line_and_column(text, flaw.position)}: {flaw.what}: {flaw.remedy}")
    for number, (record, problem, raw) in enumerate(_array(text), start=1):
        if problem is None:
            yield record, number
        else:
            at = line_and_column(text, problem.position)
            report(BadRecord(Place(file, number), at, problem.what, problem.remedy), raw)


def _no_array(text: str) -> Flaw | None:
    """Why a text is no array of records."""
    start = skip_space(text, 0)
    if text.startswith("[", start):
        return None
    if not text.startswith("{", start):
        return Flaw(start, "expected a JSON array of records", "write the records as [{…}, {…}]")
    record, end, flaw = _object_at(text, start, "write the records as [{…}, {…}]")
    if end is None:
        return flaw
    what = "expected a JSON array of records, found an object"
    if skip_space(text, end) < len(text):
        return Flaw(start, what, "one object per line? name the file .jsonl; else write [{…}, {…}]")
    lists = [key for key, value in (record or {}).items() if isinstance(value, list)]
    under = f"the records stand under {json.dumps(lists[0])}? make that array the whole file" if lists else ""
    return Flaw(start, what, under or "one record alone? write it as [{…}]")


def _array(text: str) -> Iterator[tuple[Any, Flaw | None, str | None]]:
    """The records of the array that a text is; in place of a bad one what is wrong, and its text where that is known."""
    position = skip_space(text, skip_space(text, 0) + 1)
    while not text.startswith("]", position):
        if position == len(text):
            yield None, Flaw(position, *UNCLOSED), None
            return
        record, end, flaw = _object_at(text, position, "mend it")
        if end is None:
            assert flaw is not None
            yield None, flaw._replace(remedy=f"{flaw.remedy}; nothing after it is read"), None
            return
        yield record, flaw, text[position:end] if flaw else None
        end = skip_space(text, end)
        position = end if text.startswith("]", end) else skip_space(text, end + 1)
        if not text.startswith(("]", ","), end):
            yield None, Flaw(end, *(UNCLOSED if end == len(text) else NO_COMMA)), None
            return
        if end < position and text.startswith("]", position):
            yield None, Flaw(end, "not JSON: a comma before the closing ]", "remove it"), None
    behind = skip_space(text, position + 1)
    if behind < len(text):
        yield None, Flaw(behind, "not JSON: text behind the array's end", "remove it"), None


# ---- rows and lines of text


def _csv(file: str, config: SetConfig, report: Report) -> Records:
    kind = kind_of(file)
    with open_bytes(file) as stream:
        table = Table(stream, DELIMITERS[kind])
        header: Sequence[str] | None = config.header or None
        for row in table:
            if header is None:
                header = _header(file, row)
            elif row.flaw:
                report(BadRecord(Place(file, row.line), row.at, row.flaw.what, row.flaw.remedy), row.raw)
            elif len(row.fields) != len(header):
                found = f"{len(row.fields)} field{'s' * (len(row.fields) != 1)}"
                what = f"{found}, but the header has {len(header)}"
                report(BadRecord(Place(file, row.line), str(row.line), what, TOO_MANY_FIELDS[kind]), row.raw)
            else:
                yield dict(zip(header, row.fields, strict=True)), row.line


def _header(file: str, row: Row) -> Sequence[str]:
    """The names of the columns."""
    if row.flaw:
        raise UserError(f"{file}:{row.at}: {row.flaw.what}: {row.flaw.remedy}")
    for number, name in enumerate(row.fields, start=1):
        if not name:
            remedy = "name it, or write the file without row numbers (pandas: index=False)"
            raise UserError(f"{file}:{row.line}: column {number} of the header has no name: {remedy}")
        if row.fields.index(name) < number - 1:
            raise UserError(f"{file}:{row.line}: two columns named {json.dumps(name)}: rename one of them")
    return row.fields


def _txt(file: str, config: SetConfig, report: Report) -> Records:
    with open_bytes(file) as stream:
        for text, number in _documents(stream, config.text_unit):
            if flaw := bad_byte(text):
                at = line_and_column(text, flaw.position, number)
                report(BadRecord(Place(file, number), at, flaw.what, flaw.remedy), shown_bytes(text))
            else:
                yield {"text": text}, number


def _documents(stream: BinaryIO, unit: str) -> Iterator[tuple[str, int]]:
    """Documents and the lines on which they begin."""
    if unit == "file":
        text = stream.read().decode(errors="surrogateescape").removeprefix("\ufeff").replace("\r\n", "\n")
        if text.strip():
            yield text, 1
        return
    paragraph: list[str] = []
    number = 0
    for number, raw in Lines(stream):
        line = raw.removesuffix("\n").removesuffix("\r")
        blank = not line.strip()
        if unit == "line" and not blank:
            yield line, number
        elif unit == "paragraph" and not blank:
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph), number - len(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph), number + 1 - len(paragraph)


# ---- binary files


def _parquet(file: str, config: SetConfig, report: Report) -> Records:
    import pyarrow.parquet

    with open_bytes(file) as stream:
        parquet = pyarrow.parquet.ParquetFile(stream)
        yield from _rows(file, parquet.schema_arrow, parquet.iter_batches(batch_size=BATCH_ROWS))


def _arrow(file: str, config: SetConfig, report: Report) -> Records:
    """Both of Arrow's own forms: the file, and the stream that `datasets` writes."""
    import pyarrow.ipc

    with open_bytes(file) as stream:
        opened: Any
        if stream.peek(6).startswith(b"ARROW1"):  # type: ignore[attr-defined]
            opened = pyarrow.ipc.open_file(stream)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        else:
            opened = batches = pyarrow.ipc.open_stream(stream)
        yield from _rows(file, opened.schema, batches)


def _rows(file: str, schema: Any, batches: Iterable[Any]) -> Records:
    if twice := [name for name, number in Counter(schema.names).items() if number > 1]:
        raise UserError(f"{file}: two columns named {json.dumps(twice[0])}: rename one of them")
    number = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged file may hold offsets that lead out of memory
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for record in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield record, number


TEXT_READERS: dict[str, Callable[[str, SetConfig, Report], Records]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _txt,
}
READERS = TEXT_READERS | {".parquet": _parquet, ".arrow": _arrow}
