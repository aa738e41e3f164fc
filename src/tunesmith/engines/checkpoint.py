"""Checkpoints that a crash at any instant cannot spoil: written aside, hashed, flushed to disk, renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import UserError

STATE, SEAL = "state.pt", "checkpoint.json"

Room = Callable[[tuple[Any, ...], Tensor], Tensor]
"""(keys and indices that lead to a tensor in the saved state, its shape and type) → what it is read into."""


class NotWritten(UserError):
    """A checkpoint that could not be written. Nothing is lost but itself."""

    def __init__(self, final: Path, why: str) -> None:
        free = shutil.disk_usage(next(path for path in final.parents if path.exists())).free
        self.what = f"{final}: the checkpoint could not be written: {why} ({free / 2**20:.0f} MiB free on that disk)"
        super().__init__(f"{self.what}; the checkpoints before it are intact: make room, then go on with --resume")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep`. Raises NotWritten, with nothing lost, if it cannot."""
    final = folder / f"step-{step}"
    try:
        aside = begin(folder, step)
        write_state(aside / STATE, state)
        finish(aside, final, step, sums(aside, [STATE]), keep)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        shutil.rmtree(folder / f".writing-{step}", ignore_errors=True)
        raise NotWritten(final, first_line(error)) from error
    return final


def begin(folder: Path, step: int) -> Path:
    """An empty folder beside the checkpoints."""
    aside = folder / f".writing-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    aside.mkdir()
    return aside


def write_state(file: Path, state: Any) -> None:
    """To the disk, not only to the system."""
    with file.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())


def sums(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the seal says of files."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in sorted(names)}


def finish(aside: Path, final: Path, step: int, files: Mapping[str, Any], keep: int) -> None:
    """Seal what has been written, put it in place, and let the oldest ones go."""
    _write_and_flush(aside / SEAL, json.dumps({"step": step, "files": dict(files)}) + "\n")
    _flush_folder(aside)
    remove(final)
    aside.rename(final)
    _flush_folder(final.parent)
    for old in checkpoints(final.parent)[:-keep]:
        remove(old)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def load_newest(
    folder: Path, warn: Callable[[str], None], room: Room = lambda _, x: torch.empty_like(x, device="cpu")
) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint that is whole; None if there is none at all. What several ranks have written is
    read into `room`.

    A damaged one is passed over with a warning. Raises UserError if all are damaged.
    """
    damaged: list[Path] = []
    for path in reversed(checkpoints(folder)):
        problem, step = check(path)
        if problem is None:
            for spoilt in damaged:  # else it would count among the newest that are kept
                remove(spoilt)
            return step, _read(path, room)
        damaged.append(path)
        warn(passed_over(path, problem))
    if damaged:
        raise all_damaged(folder)
    return None


def passed_over(path: Path, problem: str) -> str:
    return f"{path}: damaged ({problem}); falling back to the checkpoint before it"


def all_damaged(folder: Path) -> UserError:
    return UserError(f"{folder}: every checkpoint is damaged; start the run again in another output folder")


def _read(path: Path, room: Room) -> dict[str, Any]:
    if (path / STATE).is_file():
        return torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
    from tunesmith.engines.parts import read_parts  # only where several ranks have been at work

    return read_parts(path, room, None)


def check(path: Path, part: slice = slice(None)) -> tuple[str | None, int]:
    """(what is wrong with a checkpoint, its step). Of its files those in `part` are read, where ranks share them out."""
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        files = seal.get("files") or {STATE: {"bytes": seal["bytes"], "sha256": seal["sha256"]}}
        step = int(seal["step"])
        expected = {name: (of_file["bytes"], of_file["sha256"]) for name, of_file in files.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SEAL} is missing or unreadable", -1
    for name in sorted(expected)[part]:
        file, (size, digest) = path / name, expected[name]
        if not file.is_file():
            return f"{name} is missing", -1
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}", -1
        try:
            found = _sha256(file)
        except OSError as error:  # of a disk that fails
            return f"{name} cannot be read: {error.strerror}", -1
        if found != digest:
            return f"the hash of {name} is wrong", -1
    return None, step


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_and_flush(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Rename first: a crash while deleting must not leave half a checkpoint under a good name."""
    if path.exists():
        doomed = path.with_name(f".removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
