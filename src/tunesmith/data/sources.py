"""Where data sets lie: paths, folders, globs, URLs and hub names to the files that hold their records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.config import SetConfig
from tunesmith.data.formats.base import Record
from tunesmith.data.readers import COMPRESSIONS, READERS, Report, kind_of, raise_error, read_file
from tunesmith.errors import UserError
from tunesmith.types import Place

DEMO_SAMPLES = {"train": 1600, "eval": 200}

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
"""What fsspec needs for a protocol."""


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
    path = config.path
    if path == "demo":
        return [Source("demo", config.model_copy(update={"split": split}))]
    if path.startswith("hub:"):
        if not find_spec("datasets"):
            raise UserError(f"{path}: hub data sets are read through datasets; pip install 'tunesmith[hub]'")
        return [Source(path, config)]
    if "://" in path:
        return [Source(path, config, _urls(path, setting))]
    if Path(path).name == "dataset_info.json" or config.names:
        from tunesmith.data.dataset_info import sources_of

        return sources_of(check_file(path, setting, {".json"}), config)
    return [Source(path, config, _files(path, setting))]


def read_records(source: Source, report: Report = raise_error) -> Iterator[tuple[Record, Place]]:
    """Records with their places, in file order. A record that cannot be used goes to `report`, and reading goes on.

    Raises UserError for a file that is no file of its kind, and for a file without records.
    """
    records = (
        _demo(source) if source.name == "demo" and not source.files else _of_hub(source) if not source.files else None
    )
    if records is None:
        records = (found for file in source.files for found in _of_file(file, source.config, report))
    yield from islice(records, source.config.max_samples)


def check_file(path: str, setting: str, suffixes: set[str] | None = None) -> Path:
    """The file, if it is there, is not empty, and is of a kind that can be read."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: no such data file; check {setting} (now in {Path.cwd()})")
    if kind_of(path) not in (suffixes or READERS):
        raise UserError(f"{path}: unknown suffix {file.suffix!r}; readable: {readable()}")
    if file.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; give a file with at least one sample")
    return file


def readable() -> str:
    """All suffixes, for messages."""
    return f"{', '.join(READERS)}, each also with {' or '.join(COMPRESSIONS)} behind it"


def _files(path: str, setting: str) -> tuple[str, ...]:
    place = Path(path).expanduser()
    if place.is_dir():
        inside = [file for file in sorted(place.rglob("*")) if file.is_file()]
        visible = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(place).parts)]
        found = [file for file in visible if kind_of(file.name) in READERS and file.name != "dataset_info.json"]
        if not found:
            raise UserError(f"{path}: a folder without data files; give {setting} one with any of {readable()}")
    elif any(sign in path for sign in "*?[") and not place.exists():
        anchor = Path(place.anchor) if place.is_absolute() else Path()
        found = sorted(file for file in anchor.glob(str(place.relative_to(place.anchor))) if file.is_file())
        if not found:
            raise UserError(f"{path}: no file matches; check {setting} (now in {Path.cwd()})")
    else:
        check_file(path, setting)
        return (path,)
    for file in found:
        check_file(str(file), setting)
    return tuple(map(str, found))


def _urls(path: str, setting: str) -> tuple[str, ...]:
    import fsspec

    protocol = path.partition("://")[0]
    package = PACKAGES.get(protocol)
    if package and not find_spec(package):
        raise UserError(
            f"{path}: {protocol}:// is read through {package}, which is not installed; pip install {package}"
        )
    try:
        filesystem, inside = fsspec.core.url_to_fs(path)
        if any(sign in inside for sign in "*?["):
            found = sorted(filesystem.glob(inside))
        elif filesystem.isdir(inside):
            found = sorted(file for file in filesystem.find(inside) if kind_of(file) in READERS)
        else:
            found = [inside] if filesystem.exists(inside) else []
    except Exception as error:  # every protocol's package raises types of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path}: cannot be reached: {reason}; check {setting}, the network and your credentials"
        ) from error
    if not found:
        raise UserError(f"{path}: nothing there; check {setting}")
    for file in found:
        if kind_of(file) not in READERS:
            raise UserError(f"{file}: unknown suffix; readable: {readable()}")
    return tuple(filesystem.unstrip_protocol(file) for file in found)


def _of_file(file: str, config: SetConfig, report: Report) -> Iterator[tuple[Record, Place]]:
    seen = False

    def tell(error: UserError, raw: str | None = None) -> None:
        nonlocal seen
        seen = True
        report(error, raw)

    for record, line in read_file(file, config, tell):
        seen = True
        yield record, Place(file, line)
    if not seen:
        report(UserError(f"{file}: no records; give a file with at least one sample"), None)


def _demo(source: Source) -> Iterator[tuple[Record, Place]]:
    from tunesmith.data.demo import demo_records

    split = source.config.split
    for number, record in enumerate(demo_records(split, DEMO_SAMPLES[split]), start=1):
        yield record, Place("demo", number)


def _of_hub(source: Source) -> Iterator[tuple[Record, Place]]:
    import datasets

    name, config = source.name.removeprefix("hub:"), source.config
    try:
        records: Any = datasets.load_dataset(name, config.subset, split=config.split, streaming=True)
        for number, record in enumerate(records, start=1):
            yield record, Place(source.name, number)
    except Exception as error:  # the hub and its libraries raise types of their own
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{source.name}: the hub does not give it: {reason}; check the name, data.subset and data.split"
        ) from error
