"""Checkpoints that ranks write together, each its own part, and of which each reads what it needs: torch's distributed
checkpoints.

A folder holds the tensors in parts, and `skeleton.pt`: the state without the tensors' content. Saved on so many ranks, it is
read on any other number of them.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.futures import Future

from tunesmith.engines import checkpoint
from tunesmith.engines.checkpoint import NotWritten, Room, first_line
from tunesmith.errors import UserError
from tunesmith.tensors import copy_part, from_all, mapped, own_part

Found = TypeVar("Found")

SKELETON, INDEX = "skeleton.pt", ".metadata"
"""The state with tensors that have a shape and no content; where the parts lie, as torch writes it."""


class Failed(UserError):
    """What went wrong on some ranks, as all of them are told."""


def save_parts(folder: Path, step: int, state: dict[str, Any], keep: int, ranks: dist.ProcessGroup) -> None:
    """As `save_checkpoint`, of a state of which each rank holds a part; all of them must call this, and fail alike."""
    final, aside = folder / f"step-{step}", folder / f".writing-{step}"
    is_first = dist.get_rank(ranks) == 0
    flat: dict[str, Tensor] = {}

    def shape(path: tuple[Any, ...], x: Tensor) -> Tensor:
        flat[_name(path)] = x
        return torch.empty(x.shape, dtype=x.dtype, device="meta")

    skeleton = mapped(state, shape)
    try:
        _together(lambda: _begin(folder, step, skeleton) if is_first else None, ranks)
        _together(lambda: _see(aside), ranks)
        writer = Writer(aside)
        _save(flat, writer, ranks)
        own = writer.own | ({SKELETON, INDEX} if is_first else set())
        found = _together(lambda: checkpoint.sums(aside, own), ranks)
        files = {name: said for part in found for name, said in part.items()}
        _together(lambda: checkpoint.finish(aside, final, step, files, keep) if is_first else None, ranks)
    except Failed as failed:
        if is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise NotWritten(final, str(failed)) from failed


class Writer(dcp.FileSystemWriter):
    """Knows which files are this rank's."""

    own: set[str]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[Any]:
        written = super().write_data(plan, planner)
        self.own = {result.storage_data.relative_path for result in written.wait()}
        return written


def load_parts(
    folder: Path, warn: Callable[[str], None], room: Room, ranks: dist.ProcessGroup
) -> tuple[int, dict[str, Any]] | None:
    """As `load_newest`, into `room`, whoever wrote it; all ranks must call this, and come to the same."""
    rank, world = dist.get_rank(ranks), dist.get_world_size(ranks)
    names = _together(lambda: [path.name for path in checkpoint.checkpoints(folder)] if rank == 0 else [], ranks)[0]
    damaged: list[Path] = []
    for path in (folder / name for name in reversed(names)):
        found = _together(partial(checkpoint.check, path, slice(rank, None, world)), ranks)
        problem = next((problem for problem, _ in found if problem), None)
        if problem is None:
            _together(partial(_remove, damaged if rank == 0 else []), ranks)
            return found[0][1], read_parts(path, room, ranks)
        damaged.append(path)
        warn(checkpoint.passed_over(path, problem))
    if damaged:
        raise checkpoint.all_damaged(folder)
    return None


def read_parts(path: Path, room: Room, ranks: dist.ProcessGroup | None) -> dict[str, Any]:
    """A checkpoint's state, of each tensor what goes into its room here. ranks: None where there is this process alone."""
    if (path / checkpoint.STATE).is_file():
        saved = torch.load(path / checkpoint.STATE, map_location="cpu", weights_only=True, mmap=True)
        return mapped(saved, lambda where, x: _put(x, room(where, x)))
    flat: dict[str, Any] = {}

    def make_room(where: tuple[Any, ...], x: Tensor) -> Tensor:
        flat[_name(where)] = space = room(where, x)
        return space

    state = mapped(torch.load(path / SKELETON, weights_only=True), make_room)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(flat, storage_reader=dcp.FileSystemReader(path), process_group=ranks, no_dist=ranks is None)
    except CheckpointException as error:
        raise UserError(f"{path}: could not be read: {_told(error)}") from error
    return state


def _put(x: Tensor, space: Tensor) -> Tensor:
    local, runs = own_part(space)
    copy_part(x, runs, local)
    return space


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _save(flat: dict[str, Tensor], writer: Writer, ranks: dist.ProcessGroup) -> None:
    try:
        dcp.save(flat, storage_writer=writer, process_group=ranks)
    except CheckpointException as error:
        raise Failed(_told(error)) from error


def _told(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {first_line(found)}" for rank, (found, _) in sorted(error.failures.items()))


def _together(work: Callable[[], Found], ranks: dist.ProcessGroup) -> list[Found]:
    """What it returns on each rank. Raises Failed on all of them where it failed on some."""
    own: tuple[Any, str | None]
    try:
        own = work(), None
    except (OSError, RuntimeError) as error:
        own = None, first_line(error)
    answers = from_all(own, ranks)
    if failed := [f"rank {rank}: {why}" for rank, (_, why) in enumerate(answers) if why is not None]:
        raise Failed("; ".join(failed))
    return [found for found, _ in answers]


def _begin(folder: Path, step: int, skeleton: dict[str, Any]) -> None:
    checkpoint.write_state(checkpoint.begin(folder, step) / SKELETON, skeleton)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        checkpoint.remove(folder)


def _see(aside: Path) -> None:
    if not aside.is_dir():
        raise FileNotFoundError(f"{aside} is not there, which rank 0 has made")
