"""A function on several ranks, each a process with what a launcher sets."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.equal.ranks", "peft", "transformers.models.llama"])


def launcher(rank: int, world: int, port: int) -> dict[str, str]:
    told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in told.items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_ranks(world: int, work: Callable[..., Any], folder: Path, *arguments: Any, seconds: float = 300) -> list[Any]:
    """What `work(*arguments)` returns on each rank."""
    port = free_port()
    files = [folder / f"rank-{rank}.pt" for rank in range(world)]
    processes = []
    for rank in range(world):
        environment = launcher(rank, world, port) | {"TUNESMITH_CACHE": os.environ.get("TUNESMITH_CACHE", "")}
        processes.append(PROCESSES.Process(target=_work, args=(environment, work, arguments, str(files[rank]))))
        processes[-1].start()
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(file, weights_only=False) for file in files]


def _work(environment: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...], file: str) -> None:
    os.environ.update({name: value for name, value in environment.items() if value})
    torch.set_num_threads(1)
    torch.save(work(*arguments), file)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
