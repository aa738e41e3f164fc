"""Rows of .csv and .tsv text with their lines, read so that one bad row spoils no other.

The standard library's reader knows neither where a field begins nor how to go on after an error, and its limit on the size
of a field is one for the whole process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from tunesmith.data.json_text import Flaw, line_and_column

QUOTED = re.compile(r'"([^"]*+(?:""[^"]*+)*+)"')
UNQUOTED = {",": re.compile(r"[^,\n]*"), "\t": re.compile(r"[^\t\n]*")}
BAD_BYTE = re.compile("[\udc80-\udcff]")
ENDLESS = "a quoted field without an end", "close the quotation mark; inside a quoted field write two for one"
BEHIND_A_MARK = "text behind a closing quotation mark", "inside a quoted field write two quotation marks for one"
MAX_QUOTED_CHARACTERS = 2**26
"""A quotation mark without an end is taken for one after so much text."""


class Lines:
    """Lines of UTF-8 text with their numbers; lines can be put back. Bytes that are no UTF-8 become lone surrogates."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines = enumerate(stream, start=1)
        self._returned: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        if self._returned:
            return self._returned.pop()
        number, line = next(self._lines)
        text = line.decode(errors="surrogateescape")
        return number, text.removeprefix("\ufeff") if number == 1 else text

    def put_back(self, lines: list[tuple[int, str]]) -> None:
        """Have these lines come next."""
        self._returned.extend(reversed(lines))


def bad_byte(text: str) -> Flaw | None:
    """The first byte that is no UTF-8 in a text from Lines."""
    if text.isascii() or not (match := BAD_BYTE.search(text)):
        return None
    return Flaw(match.start(), f"not UTF-8 text (byte 0x{ord(match[0]) - 0xDC00:02x})", "save the file as UTF-8")


def shown_bytes(text: str) -> str:
    r"""Text from Lines with bytes that are no UTF-8 spelt as \xff."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Row(NamedTuple):
    """A row as it stands in the file."""

    line: int
    """On which it begins."""
    raw: str
    fields: Sequence[str] = ()
    starts: Sequence[int] | None = None
    """Where in `raw` the fields begin; None: where splitting at the delimiter says."""
    at: str = ""
    """`line:column` of the flaw."""
    flaw: Flaw | None = None
    """Why it cannot be read."""

    def start(self, column: int, delimiter: str) -> int:
        """Where in `raw` a field begins."""
        return self.starts[column] if self.starts else sum(len(f) + 1 for f in self.raw.split(delimiter)[:column])


class Table:
    """Rows of a file, the header first. Where that is flawed, nothing after it can be read.

    A row of a .tsv is split at its tabs, and a quotation mark in it is an ordinary one. Fields are quoted only if that alone
    gives as many of them as the header has, or if marks inside a field are doubled, or if all names in the header are quoted.
    """

    def __init__(self, stream: BinaryIO, delimiter: str) -> None:
        self.header: Sequence[str] = ()
        self.delimiter = delimiter
        self._lines = Lines(stream)
        self._all_quoted = False

    def __iter__(self) -> Iterator[Row]:
        for number, line in self._lines:
            raw = line.rstrip("\r\n")
            if '"' not in raw:
                row = Row(number, raw, raw.split(self.delimiter))
                if len(row.fields) == 1 and not raw.strip():
                    continue
            else:
                by_tabs = self.delimiter == "\t" and not self._all_quoted
                row = self._tabbed(number, line) if by_tabs else self._quoted((number, line))[0]
            if flaw := bad_byte(row.raw):
                at = line_and_column(row.raw, flaw.position, row.line)
                row = Row(row.line, shown_bytes(row.raw), at=at, flaw=flaw)
            self.header = self.header or row.fields
            yield row

    def _tabbed(self, number: int, line: str) -> Row:
        raw = line.rstrip("\r\n")
        fields = raw.split("\t")
        if not self.header and all(QUOTED.fullmatch(name) for name in fields):
            self._all_quoted = True
            return self._quoted((number, line))[0]
        if self.header and len(fields) != len(self.header):
            row, behind = self._quoted((number, line))
            if len(row.fields) == len(self.header):
                return row
            self._lines.put_back(behind)
        return Row(number, raw, [self._unquoted(text) for text in fields])

    @staticmethod
    def _unquoted(text: str) -> str:
        match = QUOTED.fullmatch(text) if text.startswith('"') else None
        return match[1].replace('""', '"') if match and '""' in match[1] else text

    def _quoted(self, first: tuple[int, str]) -> tuple[Row, list[tuple[int, str]]]:
        """A row by the rules of RFC 4180, and the lines that it takes beside its first. A flawed one takes no more."""
        lines = [first]
        row, end = self._scan(first[1], first[0])
        while end is None and self._add_until_a_mark(lines):
            row, end = self._scan("".join(text for _, text in lines), first[0])
        used = 1 if row.flaw else row.raw.count("\n") + 1
        self._lines.put_back(lines[used:])
        return row, lines[1:used]

    def _add_until_a_mark(self, lines: list[tuple[int, str]]) -> bool:
        """Add lines up to one in which a quoted field may end. False: there is none."""
        size = sum(len(text) for _, text in lines)
        for number, text in self._lines:
            lines.append((number, text))
            size += len(text)
            if size > MAX_QUOTED_CHARACTERS:
                return False
            if text.count('"') % 2:  # only an odd number of marks leads out of a quoted field
                return True
        return False

    def _scan(self, text: str, number: int) -> tuple[Row, int | None]:
        """The row at the beginning of a text and where it ends; or, if a quoted field has no end in it, its flaw and None."""
        fields: list[str] = []
        starts: list[int] = []
        position = 0
        while True:
            starts.append(position)
            if text.startswith('"', position):
                match = QUOTED.match(text, position)
                if match is None:
                    return _flawed(text, number, Flaw(position, *ENDLESS)), None
                fields.append(match[1].replace('""', '"'))
                end = match.end() + text.startswith("\r\n", match.end())
            else:
                match = UNQUOTED[self.delimiter].match(text, position)
                assert match is not None
                fields.append(match[0].removesuffix("\r"))
                end = match.end()
            if end == len(text) or text[end] == "\n":
                return Row(number, text[:end].removesuffix("\r"), fields, starts), end
            if text[end] != self.delimiter:
                return _flawed(text, number, Flaw(end, *BEHIND_A_MARK)), end
            position = end + 1


def _flawed(text: str, number: int, flaw: Flaw) -> Row:
    first_line = text.partition("\n")[0].rstrip("\r")
    return Row(number, first_line, at=line_and_column(text, flaw.position, number), flaw=flaw)
