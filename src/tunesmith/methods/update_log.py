"""The log of a zeroth-order run: a few bytes a step, from which the weights are made again without a forward pass.

A header says of what the log is; then a record for each update, written before the update is applied:

    header   8 bytes "TSZEROTH" · uint32 length · JSON · uint32 CRC-32 of the JSON
    record   uint32 step · uint16 count · uint32 checksum of what had gathered, 0 where none was taken · float64 coefficient of
             each of `count` directions · uint32 CRC-32 of the record before it

all little-endian. A crash can spoil the last record alone; reading ends at the first that is not whole.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError

MAGIC = b"TSZEROTH"
_HEAD, _CRC = struct.Struct("<IHI"), struct.Struct("<I")


@dataclass(frozen=True)
class Update:
    """θ ← θ - Σ_q coefficients[q] · direction_q of this step; learning rate and mean over queries are in the coefficients,
    and of low-rank directions U Vᵀ a division by the rank is not."""

    step: int
    coefficients: tuple[float, ...]
    checksum: int = 0
    """Of what had gathered before this update; 0: not taken."""

    def packed(self) -> bytes:
        body = _HEAD.pack(self.step, len(self.coefficients), self.checksum)
        body += struct.pack(f"<{len(self.coefficients)}d", *self.coefficients)
        return body + _CRC.pack(zlib.crc32(body))


class UpdateLog:
    """A log that is open for writing."""

    def __init__(self, file: Path, header: dict[str, Any], updates: Sequence[Update] = ()) -> None:
        """Begin a log, with these updates in it; whole or not at all."""
        self.file = file
        aside = file.with_name(f".{file.name}.writing")
        try:
            with aside.open("wb") as stream:
                stream.write(packed_header(header) + b"".join(update.packed() for update in updates))
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(file)
            self.stream = file.open("ab")
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise self._failed(error) from error

    def append(self, update: Update) -> None:
        """Write an update to the file. It survives the death of the process from here on, and that of the machine from the
        next `flush` on."""
        try:
            self.stream.write(update.packed())
            self.stream.flush()
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """See to it that all is on the disk."""
        try:
            os.fsync(self.stream.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            f"{self.file}: could not be written: {error.strerror}; the updates before are in it: make room, then go on with "
            "--resume"
        )


def packed_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    return MAGIC + _CRC.pack(len(text)) + text + _CRC.pack(zlib.crc32(text))


def read_log(file: Path) -> tuple[dict[str, Any], list[Update], int]:
    """(header, updates, bytes behind the last whole record that could not be read).

    Raises UserError if it is no such log, or its header is damaged.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read: {error.strerror}; give the folder of a run with method: zeroth"
        ) from error
    if not content.startswith(MAGIC):
        raise UserError(f"{file}: is no log of a zeroth-order run; give the folder of a run with method: zeroth")
    start = len(MAGIC) + _CRC.size
    length = _CRC.unpack_from(content, len(MAGIC))[0] if len(content) >= start else len(content)
    text = content[start : start + length]
    if len(content) < start + length + _CRC.size or _CRC.unpack_from(content, start + length)[0] != zlib.crc32(text):
        raise UserError(
            f"{file}: its header is damaged, so it cannot be told what it is of; move it away, and go on from the "
            "last checkpoint with --resume"
        )
    updates, place = parse_updates(content, start + length + _CRC.size)
    return json.loads(text), updates, len(content) - place


def differing(header: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What the header of a log says otherwise."""
    return sorted(name for name, value in header.items() if value != other.get(name))


def parse_updates(content: bytes, place: int = 0) -> tuple[list[Update], int]:
    """(updates, where the first that is not whole begins) from a place on."""
    updates: list[Update] = []
    while len(content) >= place + _HEAD.size:
        step, count, checksum = _HEAD.unpack_from(content, place)
        end = place + _HEAD.size + 8 * count
        if len(content) < end + _CRC.size or _CRC.unpack_from(content, end)[0] != zlib.crc32(content[place:end]):
            break
        if step != (updates[-1].step + 1 if updates else 0):
            break
        updates.append(Update(step, struct.unpack_from(f"<{count}d", content, place + _HEAD.size), checksum))
        place = end + _CRC.size
    return updates, place
