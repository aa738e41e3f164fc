"""engine: auto on several ranks: of the ways to share out a model the one that sends the least and fits, as foreseen.

Rank 0 foresees them, in a process of its own: what torch remembers of ranks that are not there stays out of the run's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.config import FsdpConfig, RunConfig
from tunesmith.display import short_bytes
from tunesmith.engines.collective import Collective
from tunesmith.engines.fsdp import FsdpEngine
from tunesmith.engines.place import place
from tunesmith.engines.single import find_device, find_precision
from tunesmith.errors import UserError
from tunesmith.methods import METHODS
from tunesmith.plan.apart import FailedApartError, apart
from tunesmith.plan.devices import memory_of
from tunesmith.plan.ranks import needed, plan_on
from tunesmith.run_data import RunData, open_data
from tunesmith.tensors import from_all


@dataclass(frozen=True)
class Ranks:
    """Where a run's ranks are."""

    world: int
    per_host: int
    """1 where hosts have different numbers of them."""
    kind: str
    """cpu or cuda."""
    memory: int
    """Bytes that each of them may take."""


@dataclass(frozen=True)
class Choice:
    """How the model is shared out."""

    engine: FsdpConfig
    why: str
    """For the run's header."""


def choose(config: RunConfig) -> tuple[RunConfig, str]:
    """A configuration whose engine fsdp was not asked for, with the settings that suit the ranks, and why these. All ranks ask
    together, and get the same answer. Raises UserError."""
    engine: Any = config.engine.model_copy(update={"replicate": 1})
    config = config.model_copy(update={"engine": engine})
    device = find_device(engine.device)
    group = Collective(device, engine.timeout_s)
    with group.telling():
        here = _memory_here(device, config.train.memory)
        ranks = ranks_of(device.type, from_all((socket.gethostname(), here)))
        found: Any = None
        if group.rank == 0:
            try:
                found = _choose(config, ranks, device)
            except UserError as error:
                found = str(error)
        found = from_all(found, group.patient)[0]
    if isinstance(found, str):
        raise UserError(found)
    # which device is a rank's own affair
    chosen = found.engine.model_copy(update={"device": engine.device})
    return config.model_copy(update={"engine": chosen}), found.why


def ranks_of(kind: str, told: Iterable[tuple[str, int]]) -> Ranks:
    """From each rank's host and the bytes that it sees. Those of a host share its memory."""
    told = list(told)
    hosts = [host for host, _ in told]
    numbers = {hosts.count(host) for host in hosts}
    shares = [size // (hosts.count(host) if kind == "cpu" else 1) for host, size in told]
    return Ranks(len(told), numbers.pop() if len(numbers) == 1 else 1, kind, min(shares))


def _memory_here(device: torch.device, limit: int | None) -> int:
    """Bytes that a rank sees; on the CPU those of all of its host's ranks. limit: what a rank may take."""
    there = memory_of(device)
    ranks_here = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", place().world))
    return min(limit * ranks_here if limit else there, there)


def candidates(engine: FsdpConfig, ranks: Ranks) -> Iterator[tuple[str, FsdpConfig]]:
    """Ways to share a model out, those first that send less to other hosts; each takes less memory than the one before."""
    world, per_host = ranks.world, ranks.per_host
    yield "a copy on every rank", _with(engine, replicate=world)
    if 1 < per_host < world:
        yield "a copy on every host, in shards", _with(engine, replicate=world // per_host)
    yield "shards", engine
    tensor = 2
    while tensor <= per_host and per_host % tensor == 0:
        yield f"shards, and layers in {tensor} parts", _with(engine, tensor_parallel=tensor)
        tensor *= 2


def _with(engine: FsdpConfig, **settings: int) -> FsdpConfig:
    return engine.model_copy(update=settings)


def _choose(config: RunConfig, ranks: Ranks, device: torch.device) -> Choice:
    needs_fp32 = METHODS[config.method.name].needs_fp32_weights(config.method)
    precision = find_precision(config.model.precision, device, needs_fp32)
    config = config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})
    engine: Any = config.engine
    able = [(name, way) for name, way in candidates(engine, ranks) if _is_able(config, way)]
    if not able:
        FsdpEngine.check(config)  # tells why
    try:
        found: Choice = apart(first_that_fits, config, ranks, able)
    except FailedApartError as error:
        return Choice(engine, f"shards, since nothing could be foreseen ({error})")
    return found


def _is_able(config: RunConfig, engine: FsdpConfig) -> bool:
    try:
        FsdpEngine.check(config.model_copy(update={"engine": engine}))
    except UserError:
        return False
    return True


def first_that_fits(config: RunConfig, ranks: Ranks, ways: list[tuple[str, FsdpConfig]]) -> Choice:
    """Of the ways the first whose peak, as foreseen, is within the memory; else the one that takes the least."""
    data = open_data(config)
    told, sizes, reason = [], {}, ""
    for name, way in ways:
        try:
            found = plan_on(on(data, way), ranks.world)
        except UserError as error:  # what this way cannot do, or what cannot be foreseen at all
            reason = str(error)
            continue
        sizes[name] = size = needed(found, ranks.kind)
        told.append(f"{name} {short_bytes(size)}")
        if size <= ranks.memory:
            return Choice(way, f"{', '.join(told)} of {short_bytes(ranks.memory)} a rank")
    if not sizes:
        return Choice(config.engine, f"shards, since nothing could be foreseen ({reason})")  # type: ignore[arg-type]
    least = min(sizes, key=lambda name: sizes[name])
    return Choice(dict(ways)[least], f"{', '.join(told)}: all more than the {short_bytes(ranks.memory)} of a rank")


def on(data: RunData, engine: FsdpConfig) -> RunData:
    """The same run with another engine."""
    return replace(data, config=data.config.model_copy(update={"engine": engine}))
