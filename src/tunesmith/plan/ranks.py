"""What a run will hold, compute and send on each of many ranks, found on one machine without weights or devices.

It is the run's own step (`plan/trace.py`), on tensors without numbers and in a process group that sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tunesmith.assemble import Run, assemble
from tunesmith.config import FsdpConfig, RunConfig
from tunesmith.data.prepare import eval_sources, training_sources, unwatched
from tunesmith.engines.context import ContextParallel
from tunesmith.engines.fsdp import FsdpEngine, mesh_shape
from tunesmith.engines.group import Group
from tunesmith.errors import UserError
from tunesmith.phases import watching
from tunesmith.plan.devices import CONTEXT
from tunesmith.plan.engine import Foreseen
from tunesmith.plan.forecast import GAPS, HELD, foreseen_precision
from tunesmith.plan.helpers import foreseen_helpers
from tunesmith.plan.ledger import Peak, Peaks
from tunesmith.plan.rows import full_rows
from tunesmith.plan.shadow import Shadow
from tunesmith.plan.shards import RankLedger
from tunesmith.plan.trace import first, first_alone, has_whole_gradients, held_out_batch, recorded, take_step
from tunesmith.plan.traffic import Count, Traffic, group_names
from tunesmith.plan.worst import largest_first, size, worst_batch
from tunesmith.run_data import RunData, open_data
from tunesmith.tensors import bytes_here
from tunesmith.types import Batch


@dataclass(frozen=True)
class Plan(Peaks):
    """Of one rank: bytes that it holds, and what a step sends and computes."""

    shape: tuple[int, int, int, int]
    """Ranks along replicate, shard, context and tensor."""
    precision: str
    peaks: Mapping[str, Peak]
    held: Mapping[str, int]
    """Bytes of weights, gradients and optimizer state, which stay from step to step or until the update."""
    traffic: Mapping[tuple[str, str], Count]
    """Of a step, by (kind, dimension of the mesh)."""
    micro_batches: int
    """Of a step."""
    rows: int
    """Of the largest micro-batch."""
    tokens: int
    """Of its longest row."""
    flops: float
    """Of a step, if all its micro-batches were as large."""
    is_read: bool
    """Whether the data was there, and this is of its largest batch; else every sample has data.max_tokens."""


class ForeseenRank(Foreseen, FsdpEngine):
    """One of several ranks, of which there is no other. Its weights are rank 0's, who has the most; its part of a batch is the
    largest."""

    has_checked = True
    shares = True
    """Whether batches are those of all ranks, of which this one takes its part."""

    def __init__(self, config: Any, precision: str, shadow: Shadow, stack: ExitStack, world: int) -> None:
        self.config = config.model_copy(update={"device": "cpu", "compile": False, "cpu_offload": False})
        self.precision, self.device, self.group = precision, torch.device("cpu"), Group()  # type: ignore[assignment]
        self.shadow, self.stack = shadow, stack
        self.lay_out(world)

    def another(self) -> ForeseenRank:
        config = self.config.model_copy(update={"activation_checkpointing": False})
        return ForeseenRank(config, self.precision, self.shadow, self.stack, dist.get_world_size())

    def own(self, batch: Batch, tokens: int) -> Batch:
        """The part of a batch with the largest micro-batch."""
        parts = [[batch.rows(*rows) for rows in pairwise(rows)] for rows in batch.split_borders(tokens, self.world)]
        largest = max(range(len(parts)), key=lambda number: size(parts[number]))
        return batch.parts(self.world)[largest]

    def rows(self, batch: Batch) -> slice:
        return slice(0, len(batch.tokens_BT))

    def micro_batches(self, batch: Batch, tokens: int) -> list[Batch]:
        return (self.own(batch, tokens) if self.shares else batch).split(tokens)

    def _check_cut(self, model: Any, context: ContextParallel) -> None:
        """That takes numbers."""


def plan(config: RunConfig, world: int) -> Plan:
    """What each of `world` ranks will hold and send. Raises UserError."""
    config = _with_fsdp(config, world)
    FsdpEngine.check_for(config, world)
    data = _data(config)
    return plan_on(data or full_rows(config), world, is_read=data is not None)


def plan_on(data: RunData, world: int, is_read: bool = True) -> Plan:
    """The same on data that has been read, with engine fsdp. Raises UserError."""
    config, shadow = data.config, Shadow()
    with process_group(world), ExitStack() as stack:
        engine = ForeseenRank(config.engine, foreseen_precision(config, None), shadow, stack, world)
        try:
            run = assemble(data, engine, unwatched, foreseen_helpers)
            with shadow.off():
                batch, held_out = worst_batch(run) if is_read else run.data(0), held_out_batch(run)
                held_out = None if held_out is None else first(run, held_out)
                number = max(map(len, batch.split_borders(run.learner.micro_batch_tokens, engine.world))) - 1
                batch = engine.own(batch, run.learner.micro_batch_tokens)
                engine.shares = False
                batch = first(run, batch)
            return _plan(run, engine, batch, held_out, number, is_read)
        except RuntimeError as error:  # torch's for what needs numbers
            raise UserError(
                f"{config.model.path}: this architecture cannot be planned, since it does not compute with tensors without "
                f"numbers ({str(error).splitlines()[0]}); another model.precision may do"
            ) from error


def _plan(run: Run, engine: ForeseenRank, batch: Batch, held_out: Batch | None, number: int, is_read: bool) -> Plan:
    ledger, learner = RankLedger(engine.shadow), run.learner
    of_parts = _Parts(ledger, names_of_groups(engine))
    one_tells = number > 1 and has_whole_gradients(learner)
    if one_tells:  # what the others take
        batch = first_alone(learner, batch)
    steps = learner.method.unlike_steps()
    next(steps)  # what comes before is no part of a step
    with recorded(run, ledger, has_gradients=one_tells):
        with engine.shadow.watched(of_parts.seen), watching(of_parts.watch):
            take_step(run, batch, ledger)
            flops, traffic = of_parts.of_step(number)
            held = held_by(learner.model, learner.method)
            for _ in steps:
                take_step(run, batch, ledger)
        if held_out is not None:
            learner.sums(run.objective, [held_out], run.helpers)
    largest = largest_first(learner.method.micro_batches(batch, learner.micro_batch_tokens))[0]
    rows, width = largest.tokens_BT.shape
    shape = mesh_shape(engine.config, dist.get_world_size())
    return Plan(shape, engine.precision, dict(ledger.peaks), held, traffic, number, rows, width, flops, is_read)


class _Parts:
    """What micro-batches compute and send, told apart from what an update does."""

    def __init__(self, ledger: RankLedger, names: Mapping[str, str]) -> None:
        self.ledger, self.traffic = ledger, Traffic(names)
        self.marks: list[_Mark] = []
        """At the beginning of each micro-batch."""

    def seen(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.traffic.seen(function, args, kwargs)

    @contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        if phase == "forward":
            self.marks.append(self.now())
        yield
        if phase == "backward":
            self.end = self.now()

    def now(self) -> _Mark:
        return _Mark(self.ledger.flops, dict(self.traffic.counts))

    def of_step(self, number: int) -> _Mark:
        """Of a step of so many micro-batches, the last of those that were traced again and again."""
        last = self.end.less(self.marks[-1])
        return self.now().plus(last.times(number - len(self.marks)))


class _Mark(NamedTuple):
    """What has been computed and sent."""

    flops: int
    traffic: dict[tuple[str, str], Count]

    def plus(self, other: _Mark) -> _Mark:
        keys = sorted(self.traffic.keys() | other.traffic.keys())
        traffic = {key: self.traffic.get(key, Count()).plus(other.traffic.get(key, Count())) for key in keys}
        return _Mark(self.flops + other.flops, traffic)

    def times(self, number: int) -> _Mark:
        return _Mark(self.flops * number, {key: count.times(number) for key, count in self.traffic.items()})

    def less(self, other: _Mark) -> _Mark:
        return self.plus(other.times(-1))


def needed(plan: Plan, kind: str) -> int:
    """Bytes at a rank's peak, with what surrounds torch's tensors."""
    moving = sum(size for what, size in plan.peak.kinds.items() if what not in HELD)
    return round(plan.peak.bytes + GAPS[kind] * moving) + CONTEXT[kind]


def held_by(model: Any, method: Any) -> dict[str, int]:
    """Bytes of what a rank holds from step to step, and of gradients before an update."""
    state = {name: value for name, value in method.state_dict().items() if name != "parameters"}
    return {
        "weights": bytes_here([*model.parameters(), *model.buffers()]),
        "gradients": bytes_here([p.grad for p in method.active().values()]),
        "optimizer state": bytes_here(state),
    }


def names_of_groups(engine: FsdpEngine) -> dict[str, str]:
    """For `Traffic`: the ranks' groups."""
    more = {} if engine.context is None else {"context": engine.context.group}
    return group_names(engine.mesh, data=engine.data_group, **more)


def _data(config: RunConfig) -> RunData | None:
    """What the run trains on; None where it is not there."""
    try:
        training_sources(config.data)
        eval_sources(config.data)
    except UserError:
        return None
    return open_data(config)


def _with_fsdp(config: RunConfig, world: int) -> RunConfig:
    if config.method.name == "zeroth":
        raise UserError(
            "method: zeroth: ranks send each other a few numbers a step, whatever the model: nothing to plan"
        )
    engine = config.engine
    if engine.name == "replicas" or (engine.name == "single" and world > 1):
        raise UserError(f"engine: {engine.name} does not train on {world} ranks: set it to fsdp or auto")
    if engine.name != "fsdp":
        engine = FsdpConfig(activation_checkpointing=engine.activation_checkpointing)
    return config.model_copy(update={"engine": engine})


@contextmanager
def process_group(world: int) -> Iterator[None]:
    """One rank of so many that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # it registers the backend

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
