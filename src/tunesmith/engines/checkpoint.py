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
    final = folder / f"step-{step}"
    try:
        aside = _begin(folder, step)
        with (aside / STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _finish(aside, final, step)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        shutil.rmtree(folder / f".writing-{step}", ignore_errors=True)
        raise _not_written(final, error) from error
    _keep(folder, keep)
    return final


def save_parts(folder: Path, step: int, state: dict[str, Any], keep: int, rank: int) -> Path:
    """The same where each rank holds a part of the state, and writes it; all of them must call this."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    final = folder / f"step-{step}"
    if rank == 0:
        _begin(folder, step)
    dist.barrier()
    dcp.save(state, checkpoint_id=folder / f".writing-{step}")
    if rank == 0:
        _finish(folder / f".writing-{step}", final, step)
        _keep(folder, keep)
    dist.barrier()
    return final


def _begin(folder: Path, step: int) -> Path:
    """An empty folder beside the checkpoints."""
    aside = folder / f".writing-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    aside.mkdir()
    return aside


def _finish(aside: Path, final: Path, step: int) -> None:
    """Seal what has been written, and put it in place."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(aside.iterdir())}
    _write_and_flush(aside / SEAL, json.dumps({"step": step, "files": files}) + "\n")
    _remove(final)
    aside.rename(final)
    _flush_folder(final.parent)


def _not_written(final: Path, error: Exception) -> UserError:
    free = shutil.disk_usage(next(path for path in final.parents if path.exists())).free
    return UserError(
        f"{final}: the checkpoint could not be written: {str(error).splitlines()[0]} ({free / 2**20:.0f} MiB free on that "
        "disk); the checkpoints before it are intact: make room, then go on with --resume"
    )


def _keep(folder: Path, number: int) -> None:
    for old in checkpoints(folder)[:-number]:
        _remove(old)


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
            return step, _read(path)
        damaged.append(path)
        warn(f"{path}: damaged ({problem}); falling back to the checkpoint before it")
    if damaged:
        raise UserError(f"{folder}: every checkpoint is damaged; start the run again in another output folder")
    return None


def _read(path: Path) -> dict[str, Any]:
    """The state in whole tensors, whoever wrote it."""
    if (path / STATE).is_file():
        return torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def _check(path: Path) -> tuple[str | None, int]:
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        files = seal.get("files") or {STATE: {"bytes": seal["bytes"], "sha256": seal["sha256"]}}
        step = int(seal["step"])
        expected = {name: (of_file["bytes"], of_file["sha256"]) for name, of_file in files.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SEAL} is missing or unreadable", -1
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", -1
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}", -1
        if _sha256(file) != digest:
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


def _remove(path: Path) -> None:
    """Rename first: a crash while deleting must not leave half a checkpoint under a good name."""
    if path.exists():
        doomed = path.with_name(f".removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
