"""A plan as a table, with the time that its communication takes beside computation."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tunesmith.config import RunConfig
from tunesmith.display import header, short_bytes, short_number, short_seconds
from tunesmith.errors import UserError
from tunesmith.plan.devices import Device
from tunesmith.plan.ranks import Plan, needed, plan

HELD = ("weights", "adapter", "gradients", "optimizer state")
"""What cpu_offload keeps in the host's memory."""


FEW = 1024
"""Bytes of numbers that are not worth a line, such as losses and norms."""


@dataclass(frozen=True)
class Machine:
    """What the ranks run on: GB/s that a device sends within its node and to others, and TFLOP/s that it reaches."""

    link: float
    network: float
    ranks_per_node: int
    flops: float


def print_plan(
    config: RunConfig, world: int, machine: Machine, device: Device | None = None, console: Console | None = None
) -> None:
    """Plan, and print what is found. device: on which a rank is to fit. Raises UserError."""
    if not config.model.path:
        raise UserError("model.path: give a folder with a config.json, or a hub id")
    found = plan(config, world)
    console = console or Console()
    header(console, f"tunesmith plan: {config.model.path} on {world} ranks", _facts(config, found))
    console.print(_memory(config, found))
    if device is not None:
        size = needed(found, device.kind)
        verdict = "fits" if size <= device.memory else "does not fit"
        console.print(
            f"{verdict}: {short_bytes(size)} of {short_bytes(device.memory)} on {device.name}", highlight=False
        )
    console.print(_traffic(found, machine), highlight=False)
    seconds, waiting = found.flops / machine.flops / 1e12, _waiting(found, machine)
    console.print(
        f"computation {short_number(found.flops)}FLOP, {short_seconds(seconds)} at {machine.flops:g} TFLOP/s; communication "
        f"{short_seconds(waiting)}: {waiting / (seconds + waiting):.0%} of the step if nothing overlaps",
        highlight=False,
    )


def _facts(config: RunConfig, found: Plan) -> list[tuple[str, str]]:
    ranks = " × ".join(
        f"{name} {n}" for name, n in zip(("replicate", "shard", "context", "tensor"), found.shape, strict=True)
    )
    of = "the largest of the data's" if found.is_read else "if every sample has data.max_tokens"
    return [
        ("ranks", ranks),
        ("method", f"{config.method.name}, {config.optimizer.name}, {found.precision}"),
        (
            "step of a rank",
            f"{found.micro_batches} micro-batches of {found.rows} × {found.tokens} tokens, {of}",
        ),
    ]


def _memory(config: RunConfig, found: Plan) -> Table:
    table = Table(title=f"memory of a rank: {found.phase or 'update'}", title_justify="left", box=None, pad_edge=False)
    for name in ("", "bytes", ""):
        table.add_column(name, justify="right" if name else "left")
    offloaded = HELD if getattr(config.engine, "cpu_offload", False) else ()
    kinds = found.peak.kinds
    for name in sorted(kinds, key=lambda name: -kinds[name]):
        table.add_row(name, short_bytes(kinds[name]), "in the host's memory" if name in offloaded else "")
    table.add_row("together", short_bytes(sum(size for name, size in kinds.items() if name not in offloaded)), "")
    return table


def _traffic(found: Plan, machine: Machine) -> Table:
    table = Table(title="what a rank sends in a step", title_justify="left", box=None, pad_edge=False)
    for name in ("", "over", "calls", "payload", "sent", "link", "time"):
        table.add_column(name, justify="left" if name in ("", "over", "link") else "right", no_wrap=True)
    for (kind, group), count in found.traffic.items():
        if count.payload < FEW:
            continue
        speed, link = _speed(found, group, machine)
        table.add_row(
            kind, group, str(count.calls), short_bytes(count.payload), short_bytes(count.sent),
            f"{link}, {speed:g} GB/s", short_seconds(count.sent / speed / 1e9),
        )  # fmt: skip
    return table


def _waiting(found: Plan, machine: Machine) -> float:
    return sum(count.sent / _speed(found, group, machine)[0] / 1e9 for (_, group), count in found.traffic.items())


def _speed(found: Plan, group: str, machine: Machine) -> tuple[float, str]:
    """(GB/s, name) of the slowest link between ranks of a group. Ranks along tensor are neighbours, then come those along
    context, shard and replicate."""
    replicate, shard, context, tensor = found.shape
    span = {"tensor": tensor, "shard": shard * context * tensor}.get(group, replicate * shard * context * tensor)
    if span <= machine.ranks_per_node and machine.ranks_per_node % span == 0:
        return machine.link, "node"
    return machine.network, "network"
