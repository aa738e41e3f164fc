"""Files to records. A record comes with its place, so that every later error can name file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.formats.base import Record
from tunesmith.errors import UserError
from tunesmith.types import Place

DEMO_SAMPLES = {"train": 1600, "eval": 200}


def read_records(path: str, split: str = "train") -> Iterator[tuple[Record, Place]]:
    """Records of a file, or of `demo`'s split ("train" or "eval"), in file order.

    Raises UserError that names file, line and remedy for a file that is missing, empty, or not what its suffix says.
    """
    if path == "demo":
        from tunesmith.data.demo import demo_records

        for index, record in enumerate(demo_records(split, DEMO_SAMPLES[split]), start=1):
            yield record, Place("demo", index)
        return
    file = check_data_file(path)
    found = False
    for record, line in READERS[file.suffix](file):
        place = Place(path, line)
        if not isinstance(record, dict):
            hint = (
                " (a whole JSON array? name the file .json)"
                if isinstance(record, list) and file.suffix == ".jsonl"
                else ""
            )
            raise UserError(f"{place}: expected an object with keys, found {type(record).__name__}{hint}")
        found = True
        yield record, place
    if not found:
        raise UserError(f"{path}: no records; give a file with at least one sample")


def check_data_file(path: str, setting: str = "the path") -> Path:
    """The file, if it is there and of a kind that can be read."""
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"{path}: no such data file; check {setting} (now in {Path.cwd()})")
    if file.is_dir():
        raise UserError(f"{path}: a folder; give one file of it as {setting}")
    if file.suffix not in READERS:
        raise UserError(f"{path}: unknown suffix {file.suffix!r}; readable: {', '.join(READERS)}")
    if file.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; give a file with at least one sample")
    return file


def _decode(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error


def _jsonl(file: Path) -> Iterator[tuple[Any, int]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")), number
            except UnicodeDecodeError as error:
                raise UserError(f"{file}:{number}: not UTF-8 text; save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                hint = " (a whole JSON array? name the file .json)" if number == 1 and line.lstrip()[:1] == b"[" else ""
                what = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else str(error))
                raise UserError(f"{file}:{number}: not JSON: {what}; one object per line is expected{hint}") from error


def _json(file: Path) -> Iterator[tuple[Any, int]]:
    text = _decode(file)
    try:
        tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        hint = " (one object per line? name the file .jsonl)" if getattr(error, "msg", "") == "Extra data" else ""
        raise UserError(f"{file}:{line}: not JSON: {getattr(error, 'msg', 'nested too deeply')}{hint}") from error
    if not isinstance(tree, list):
        raise UserError(f"{file}:1: expected a JSON array of records, found {type(tree).__name__}")
    for number, record in enumerate(tree, start=1):
        yield record, number


def _parquet(file: Path) -> Iterator[tuple[Any, int]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for part in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for record in part.to_pylist():
                number += 1
                yield record, number
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _txt(file: Path) -> Iterator[tuple[Any, int]]:
    for number, line in enumerate(_decode(file).replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            yield {"text": line}, number


READERS: dict[str, Callable[[Path], Iterator[tuple[Any, int]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _txt,
}
