"""Records that cannot be used: collected, counted, and copied aside."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data.sources import Source, read_records
from tunesmith.errors import DataError, UserError
from tunesmith.inspect.tally import Tally
from tunesmith.run_folder import writing
from tunesmith.types import Place

ROLE_KEYS = ("role", "from")


@dataclass
class Errors:
    """What is wrong with the data: the first `limit` in full, all of them counted."""

    limit: int
    keep_reasons: bool = False
    """Remember why each bad record is bad, for the quarantine."""
    shown: list[UserError] = field(default_factory=list)
    number: int = 0
    bad: dict[Place, str] = field(default_factory=dict)
    """Bad records, and what is wrong with each."""

    def add(self, error: UserError, tally: Tally) -> bool:
        """Note an error. Several of one record make one bad record; tells whether this is its first."""
        self.number += 1
        if len(self.shown) < self.limit:
            self.shown.append(error)
        if not isinstance(error, DataError) or error.place in self.bad:
            return False
        self.bad[error.place] = error.reason if self.keep_reasons else ""
        tally.bad += 1
        tally.role_errors += error.path[-1:] in [(name,) for name in ROLE_KEYS] or "without role" in error.what
        return True

    def sort(self, start: int) -> None:
        """Put errors from number `start` on in the order of the lines: some are found only when a record is rendered."""
        self.shown[start:] = sorted(self.shown[start:], key=_where)


def _where(error: UserError) -> tuple[str, int]:
    return (error.place.file, error.place.line) if isinstance(error, DataError) else ("", 0)


def write_quarantine(file: Path, sources: list[Source], bad: dict[Place, str]) -> int:
    """Copy the bad records, in the order of the files, into a .jsonl; returns how many. Nothing is written if none is bad.

    The data is read once more: so no record has to be held in memory, and what is no JSON is copied as it stands.
    """
    if not bad:
        return 0
    number = 0
    with writing(file, errors="backslashreplace") as stream:
        for source in sources:
            for place, record in _bad_records(source, bad):
                line = {"error": bad[place], "file": place.file, "line": place.line, "record": record}
                stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                number += 1
    return number


def _bad_records(source: Source, bad: dict[Place, str]) -> Iterator[tuple[Place, Any]]:
    """Bad records of a data set: as JSON, or as text where they are none."""
    unread: list[tuple[Place, Any]] = []

    def note(error: UserError, raw: str | None) -> None:
        if isinstance(error, DataError) and error.place in bad:
            unread.append((error.place, raw))

    with contextlib.suppress(UserError):  # named already when the data was read before
        for record, place in read_records(source, note):
            yield from unread
            unread.clear()
            if place in bad:
                yield place, record
    yield from unread
