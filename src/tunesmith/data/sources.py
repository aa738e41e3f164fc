"""Where data sets lie: paths, folders, globs, URLs and hub names to the files that hold their records."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.config import SetConfig
from tunesmith.data.formats.base import Record
from tunesmith.data.readers import READERS, Report, kind_of, raise_error, read_file, readable, reason
from tunesmith.errors import UserError
from tunesmith.types import Place

__all__ = ["DEMO_SAMPLES", "Report", "Source", "find_sources", "raise_error", "read_records"]

DEMO_SAMPLES = {"train": 1600, "eval": 200}

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "oss": "ossfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
"""What fsspec needs for a protocol."""

DATASET_INFO = "dataset_info.json"
DATASETS_OWN = ("state.json", "dataset_dict.json")
"""What `datasets` writes beside its .arrow files."""

HUB_NAME = re.compile(r"hub:[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One data set, found."""

    name: str
    """As the user wrote it, or the entry's name in a dataset_info.json."""
    config: SetConfig
    files: tuple[str, ...] = ()
    """Local paths or URLs, in the order in which they are read; none for hub data sets and the demo."""
    transform: Callable[[Record], Record] | None = None
    """Makes our form of records that an entry of dataset_info.json describes."""


def find_sources(config: SetConfig, setting: str = "data.path", split: str = "train") -> list[Source]:
    """The data sets behind a path; opens no file. `split`: which part of the demo. Raises UserError that names `setting`."""
    path = os.path.expanduser(config.path)
    if path.startswith("file://"):
        from fsspec.implementations.local import LocalFileSystem

        path = LocalFileSystem._strip_protocol(path)
    is_local = not (path == "demo" or path.startswith("hub:") or "://" in path)
    if is_local and (config.names or os.path.basename(path) == DATASET_INFO):
        from tunesmith.data.dataset_info import sources_of

        file = os.path.join(path, DATASET_INFO) if os.path.isdir(path) else path
        _check_file(file, setting)
        return sources_of(Path(file), config)
    if config.names:
        raise UserError(
            f"{path}: data.names picks from a local {DATASET_INFO}; remove it, or let {setting} name such a file"
        )
    if path == "demo":
        return [Source("demo", config.model_copy(update={"split": split}))]
    if path.startswith("hub:"):
        return [_hub(config, setting)]
    return [Source(config.path, config, _files(path, setting) if is_local else _urls(path, setting))]


def read_records(source: Source, report: Report = raise_error) -> Iterator[tuple[Record, Place]]:
    """Records with their places, in file order. A record that cannot be read goes to `report`, and reading goes on.

    Raises UserError for a file that is no file of its kind, and for a file without records.
    """
    records: Iterator[tuple[Record, Place]]
    if source.files:
        records = (found for file in source.files for found in _of_file(file, source.config, report))
    else:
        records = _demo(source) if source.config.path == "demo" else _of_hub(source)
    return islice(records, source.config.max_samples)


# ---- finding


def _check_file(path: str, setting: str) -> None:
    """Raises UserError unless there is a file that can be read."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such data file; check {setting} (now in {Path.cwd()})")
    _check(path, os.path.getsize(path), setting)


def _check(name: str, size: int | None, setting: str) -> None:
    """Raises UserError for a file of an unknown kind, or without content."""
    if kind_of(name) not in READERS:
        suffix = "".join(Path(name).suffixes[-2:])
        raise UserError(f"{name}: unknown suffix {suffix!r}; let {setting} name files of these: {readable()}")
    if size == 0:
        raise UserError(f"{name}: the file is empty; let {setting} name files with at least one record")


def _files(path: str, setting: str) -> tuple[str, ...]:
    if os.path.isdir(path):
        found = _in_folder(path)
        if not found:
            raise UserError(f"{path}: a folder without data files; let {setting} name one with any of {readable()}")
    elif any(sign in path for sign in "*?[") and not os.path.exists(path):
        found = sorted(file for file in glob(path, recursive=True) if os.path.isfile(file))
        if not found:
            raise UserError(f"{path}: no file matches; check {setting} (now in {Path.cwd()})")
    else:
        found = [path]
    for file in found:
        _check_file(file, setting)
    return tuple(found)


def _in_folder(path: str) -> list[str]:
    """The files in a folder and below it that can be read."""
    folder = Path(path)
    visible = [
        file
        for file in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts) and file.is_file()
    ]
    written_by_datasets = any(file.suffix == ".arrow" for file in visible)
    skipped = (DATASET_INFO, *(DATASETS_OWN if written_by_datasets else ()))
    return [str(file) for file in visible if kind_of(file.name) in READERS and file.name not in skipped]


def _urls(path: str, setting: str) -> tuple[str, ...]:
    import fsspec

    protocol = path.partition("://")[0].rpartition("::")[2]
    package = PACKAGES.get(protocol)
    if package and not find_spec(package):
        raise UserError(
            f"{path}: {protocol}:// needs a package: pip install {package}, or let {setting} name a local copy"
        )
    try:
        filesystem, inside = fsspec.core.url_to_fs(path)
        if any(sign in inside for sign in ("*[" if protocol in ("http", "https") else "*?[")):
            found = filesystem.glob(inside, detail=True)
        else:
            found = {inside: filesystem.info(inside)}
            if found[inside]["type"] == "directory":
                below = filesystem.find(inside, detail=True)
                found = {file: facts for file, facts in below.items() if kind_of(file) in READERS}
    except FileNotFoundError:
        found = {}
    except Exception as error:  # every protocol's package raises types of its own
        remedy = f"check {setting}, the network and your credentials"
        raise UserError(f"{path}: cannot be reached: {reason(error)}; {remedy}") from error
    files = {file: facts.get("size") for file, facts in sorted(found.items()) if facts["type"] == "file"}
    if not files:
        raise UserError(f"{path}: no data file there; check {setting}")
    names = {file: path if file == inside else filesystem.unstrip_protocol(file) for file in files}
    for file, size in files.items():
        _check(names[file], size, setting)
    return tuple(names.values())


def _hub(config: SetConfig, setting: str) -> Source:
    if not HUB_NAME.fullmatch(config.path):
        raise UserError(f"{config.path}: no name of a hub data set; write hub:owner/name in {setting}")
    if not find_spec("datasets"):
        raise UserError(f"{config.path}: {setting} names a hub data set, which needs a package: pip install datasets")
    return Source(config.path, config)


# ---- reading


def _of_file(file: str, config: SetConfig, report: Report) -> Iterator[tuple[Record, Place]]:
    empty = True

    def tell(error: UserError, raw: str | None = None) -> None:
        nonlocal empty
        empty = False
        report(error, raw)

    for record, line in read_file(file, config, tell):
        empty = False
        yield record, Place(file, line)
    if empty:
        raise UserError(f"{file}: no records: give a file with at least one")


def _demo(source: Source) -> Iterator[tuple[Record, Place]]:
    from tunesmith.data.demo import demo_records

    split = source.config.split
    for number, record in enumerate(demo_records(split, DEMO_SAMPLES[split]), start=1):
        yield record, Place("demo", number)


def _of_hub(source: Source) -> Iterator[tuple[Record, Place]]:
    import datasets

    path, config = source.config.path, source.config
    number = 0
    try:
        found: Any = datasets.load_dataset(path.removeprefix("hub:"), config.subset, split=config.split, streaming=True)
        # Media stay encoded, as in files: their decoders are packages of their own.
        for record in found.decode(False):
            number += 1
            yield record, Place(path, number)
    except Exception as error:  # the hub and its libraries raise types of their own
        behind = f" behind record {number}" if number else ""
        remedy = "check the name, data.subset, data.split, the network and your token (hf auth login)"
        raise UserError(f"{path}: cannot be read{behind}: {reason(error)}: {remedy}") from error
    if not number:
        raise UserError(f"{path}: no records: check data.subset and data.split")
