"""The ranks that sum tensors: torch.distributed's process group, and what they agree on beside the tensors."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist

from tunesmith.engines.group import Group, check_alike
from tunesmith.engines.place import place
from tunesmith.engines.watch import Watch
from tunesmith.errors import PeerError, UserError
from tunesmith.tensors import from_all

PREPARE_S = 12 * 3600.0
"""One rank may take so long to read and tokenize data while others wait."""
WRITE_S = 3600.0
"""A rank may take so long to write its part of a checkpoint, if engine.timeout_s is not longer."""
SEEN_S = 20.0
"""A file that another host has written is seen by then."""


class Collective(Group):
    """All ranks do the same steps, each on its part of every tensor and batch. None of them can be missed."""

    reads_checkpoints = True

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        here = place()
        self.rank, self.world = here.rank, here.world
        self.ranks = (self.rank,)  # no rank has batches for itself
        _connect(device, timeout_s)
        self.patient = _patient(dist.group.WORLD, PREPARE_S)
        self.writers = _patient(dist.group.WORLD, max(timeout_s, WRITE_S))
        kinds = [str(kind) for kind in from_all(device.type)]
        if len(set(kinds)) > 1:
            raise UserError(
                f"engine.device: the ranks have {', '.join(kinds)}: start all of them on devices of one kind"
            )
        self.watch = Watch(_own_store() if self.world > 1 else None, self.rank, self.world, timeout_s)

    @classmethod
    def rank_here(cls) -> int:
        return place().rank

    @contextmanager
    def joined(self, facts: Mapping[str, Any]) -> Iterator[None]:
        with self.watch.telling():
            check_alike(dict(enumerate(from_all(dict(facts)))))
            yield
            self.at(self.watch.step, "end")
            dist.barrier(self.patient)  # rank 0 may still put the model in place

    @contextmanager
    def telling(self) -> Iterator[None]:
        with self.watch.telling():
            yield

    def check_shared(self, folder: Path) -> None:
        probe, sign = folder / ".seen-by-all", from_all(uuid.uuid4().hex)[0]
        problem = _write_probe(probe, sign) if self.rank == 0 else None
        if problem := from_all(problem)[0]:
            raise UserError(f"output: {folder}: rank 0 on {socket.gethostname()} cannot write there: {problem}")
        answers = from_all((_sees(probe, sign), socket.gethostname(), str(folder)))
        if self.rank == 0:
            probe.unlink()
        if blind := [f"rank {n} on {host} ({path})" for n, (sees, host, path) in enumerate(answers) if not sees]:
            raise UserError(
                f"output: what rank 0 on {answers[0][1]} writes into {answers[0][2]} is not seen by {', '.join(blind)}: ranks "
                "save checkpoints together; set output to a folder of a disk that all of them share"
            )

    def at(self, step: int, doing: str) -> None:
        self.watch.at(step, doing)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        is_first = place().local_rank == 0
        try:
            if not is_first:
                dist.barrier(self.patient)
            yield
        finally:  # whatever went wrong will go wrong for the others, too
            if is_first:
                dist.barrier(self.patient)

    def agree(self, number: int) -> int:
        told = torch.tensor(number)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def heed(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: bool(self.agree(int(stop())))


def _connect(device: torch.device, timeout_s: float) -> None:
    """Join the process group, which then lasts as long as the process. Numbers on the CPU go over gloo whatever the device."""
    if dist.is_initialized():
        return
    backend = (
        "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    )
    timeout = timedelta(seconds=timeout_s)
    if place().world == 1:  # nobody is to be met
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        return
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (dist.DistError, ValueError) as error:
        raise PeerError(
            f"engine: the ranks did not meet at {where} within {timeout_s:g} s: {str(error).splitlines()[0]}; see that all of "
            "them run, and that MASTER_ADDR and MASTER_PORT lead to a free port of rank 0's machine"
        ) from error


@cache
def _patient(_world: dist.ProcessGroup, timeout_s: float) -> dist.ProcessGroup:
    """All ranks once more, who wait longer for each other, and apart from the training: disks are slower than ranks."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def _own_store() -> dist.Store:
    """A connection of its own to the store through which the ranks have met."""
    return dist.PrefixStore("tunesmith/watch", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]


def _write_probe(probe: Path, sign: str) -> str | None:
    """Why it cannot be written."""
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text(sign)
    except OSError as error:
        return str(error)
    return None


def _sees(probe: Path, sign: str) -> bool:
    """Whether the file is there, or comes within the time that network file systems may take."""
    deadline = monotonic() + SEEN_S
    while not (probe.is_file() and probe.read_text() == sign):
        if monotonic() > deadline:
            return False
        sleep(0.2)
    return True
