"""Checkpoints that a crash at any instant cannot spoil: written aside, hashed, flushed to disk, renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import UserError

STATE, SEAL = "state.pt", "checkpoint.json"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep`. Raises UserError, with nothing lost, if it cannot."""
    aside, final = folder / f".writing-{step}", folder / f"step-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        aside.mkdir()
        with (aside / STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        seal = {"step": step, "bytes": (aside / STATE).stat().st_size, "sha256": _sha256(aside / STATE)}
        _write_and_flush(aside / SEAL, json.dumps(seal) + "\n")
        _remove(final)
        aside.rename(final)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        raise UserError(
            f"{final}: the checkpoint could not be written: {str(error).splitlines()[0]} ({free / 2**20:.0f} MiB free on that "
            "disk); the checkpoints before it are intact: make room, then go on with --resume"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        _remove(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def load_newest(folder: Path, warn: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint that is whole; None if there is none at all.

    A damaged one is passed over with a warning. Raises UserError if all are damaged.
    """
    damaged: list[Path] = []
    for path in reversed(checkpoints(folder)):
        problem, step = _check(path)
        if problem is None:
            for spoilt in damaged:  # else it would count among the newest that are kept
                _remove(spoilt)
            return step, torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
        damaged.append(path)
        warn(f"{path}: damaged ({problem}); falling back to the checkpoint before it")
    if damaged:
        raise UserError(f"{folder}: every checkpoint is damaged; start the run again in another output folder")
    return None


def _check(path: Path) -> tuple[str | None, int]:
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        expected = seal["bytes"], seal["sha256"], int(seal["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SEAL} is missing or unreadable", -1
    if not (path / STATE).is_file():
        return f"{STATE} is missing", -1
    size = (path / STATE).stat().st_size
    if size != expected[0]:
        return f"{STATE} has {size} bytes instead of {expected[0]}", -1
    if _sha256(path / STATE) != expected[1]:
        return f"the hash of {STATE} is wrong", -1
    return None, expected[2]


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


def _remove(path: Path) -> None:
    """Rename first: a crash while deleting must not leave half a checkpoint under a good name."""
    if path.exists():
        doomed = path.with_name(f".removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
