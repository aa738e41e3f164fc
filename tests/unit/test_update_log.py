"""The log of updates: every byte of it, and what is left of it after a crash."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from tunesmith.errors import UserError
from tunesmith.methods.update_log import MAGIC, Update, UpdateLog, parse_updates, read_log

HEADER = {"base_weights_hash": "abc", "seed": 3}
UPDATES = [Update(0, (0.5, -1e-300)), Update(1, (float("inf"),), 77), Update(2, ())]


def written(folder: Path) -> Path:
    log = UpdateLog(folder / "updates.log", HEADER)
    for update in UPDATES:
        log.append(update)
    log.flush()
    return log.file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_log(written(tmp_path)) == (HEADER, UPDATES, 0)


def test_the_bytes_are_those_that_are_documented(tmp_path: Path) -> None:
    text = b'{"base_weights_hash": "abc", "seed": 3}'
    expected = b"TSZEROTH" + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text))
    for step, check, values in ((0, 0, (0.5, -1e-300)), (1, 77, (float("inf"),)), (2, 0, ())):
        record = struct.pack("<I", step) + struct.pack("<H", len(values)) + struct.pack("<I", check)
        record += b"".join(struct.pack("<d", value) for value in values)
        expected += record + struct.pack("<I", zlib.crc32(record))
    assert written(tmp_path).read_bytes() == expected


def test_a_step_with_one_direction_takes_22_bytes() -> None:
    assert len(Update(5, (1.0,)).packed()) == 22


def test_a_log_that_ends_anywhere_is_read_up_to_there(tmp_path: Path) -> None:
    file = written(tmp_path)
    whole = file.read_bytes()
    start = len(whole) - sum(len(update.packed()) for update in UPDATES)
    for end in range(start, len(whole) + 1):
        file.write_bytes(whole[:end])
        _, updates, lost = read_log(file)
        number = next(n for n in (3, 2, 1, 0) if end >= start + sum(len(u.packed()) for u in UPDATES[:n]))
        assert updates == UPDATES[:number]
        assert lost == end - start - sum(len(update.packed()) for update in UPDATES[:number])


def test_a_flipped_bit_ends_the_log_before_its_record(tmp_path: Path) -> None:
    file = written(tmp_path)
    whole = file.read_bytes()
    start = len(whole) - sum(len(update.packed()) for update in UPDATES)
    second = start + len(UPDATES[0].packed())
    for place in range(second, second + len(UPDATES[1].packed())):
        for bit in (0, 7):
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << bit
            file.write_bytes(spoilt)
            assert read_log(file)[1] == UPDATES[:1]


def test_a_record_out_of_turn_ends_the_log() -> None:
    packed = Update(0, (1.0,)).packed() + Update(2, (1.0,)).packed()
    assert parse_updates(packed)[0] == [Update(0, (1.0,))]


@pytest.mark.parametrize("place", [len(MAGIC), len(MAGIC) + 3, len(MAGIC) + 4, 20, 50])
def test_a_damaged_header_is_told(tmp_path: Path, place: int) -> None:
    file = written(tmp_path)
    spoilt = bytearray(file.read_bytes())
    spoilt[place] ^= 0x80
    file.write_bytes(spoilt)
    with pytest.raises(UserError, match="header is damaged"):
        read_log(file)


@pytest.mark.parametrize("content", [b"", b"TSZERO", b"not a log at all"])
def test_another_file_is_told(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "updates.log"
    file.write_bytes(content)
    with pytest.raises(UserError, match="is no log of a zeroth-order run"):
        read_log(file)


def test_a_missing_log_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: No such file.*method: zeroth"):
        read_log(tmp_path / "updates.log")


def test_a_log_goes_on_with_what_was_whole(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-3])
    header, updates, _ = read_log(file)
    log = UpdateLog(file, header, updates)
    log.append(Update(2, (2.0,)))
    assert read_log(file) == (HEADER, [*UPDATES[:2], Update(2, (2.0,))], 0)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    log = UpdateLog(tmp_path / "updates.log", HEADER)
    log.stream.close()
    log.stream = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(UserError, match=r"No space left.*--resume"):
        log.append(Update(0, (1.0,)))
