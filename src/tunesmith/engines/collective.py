"""The ranks that sum tensors: torch.distributed's process group, and what they agree on beside the tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tunesmith.engines.group import Group, check_alike
from tunesmith.engines.place import place
from tunesmith.errors import PeerError

PREPARATION = timedelta(hours=12)
"""What one rank may take to read and tokenize data while others wait."""


class Collective(Group):
    """All ranks do the same steps, each on its part of every tensor and batch. None of them can be missed."""

    reads_checkpoints = True

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        here = place()
        self.rank, self.world = here.rank, here.world
        self.ranks = (self.rank,)  # no rank has batches for itself
        _connect(device, timeout_s)
        self.patient = dist.new_group(backend="gloo", timeout=PREPARATION)

    @classmethod
    def rank_here(cls) -> int:
        return place().rank

    @contextmanager
    def joined(self, facts: Mapping[str, Any]) -> Iterator[None]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, dict(facts))
        check_alike(dict(enumerate(found)))
        yield
        dist.barrier()

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
