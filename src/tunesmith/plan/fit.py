"""Configurations near to one that does not fit on a device, and do: in order of what they change about the result.

Every one of them is foreseen as a run of its own; nothing is scaled from another's numbers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch.distributed as dist
import yaml

from tunesmith.config import FsdpConfig, RunConfig
from tunesmith.config_file import config_from_dict, settings_of
from tunesmith.engines import is_able, with_engine
from tunesmith.engines.fsdp import FsdpEngine
from tunesmith.errors import UserError
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES
from tunesmith.plan.devices import Device
from tunesmith.plan.forecast import TIGHT, Forecast, foresee, settled
from tunesmith.plan.ranks import needed, plan_on
from tunesmith.run_data import RunData, open_data

Harm = Literal["same result", "result differs a little", "another method", "other data"]
Tree = dict[str, Any]

WANTED = 3
"""Configurations that fit, after which no more are looked for."""
OF_A_NODE = (2, 4, 8)
"""Devices that are tried where one is too small."""
SHORTEST = 64
"""Tokens below which data is not cut."""


@dataclass(frozen=True)
class Candidate:
    """A configuration near to the one that was asked for."""

    remedies: tuple[str, ...]
    """Names of what was changed; none where it is the one that was asked for."""
    harm: Harm
    config: RunConfig
    """As it would be written: what is found out when the run begins is left to that."""
    overrides: tuple[str, ...]
    """Settings that make it, as the command line takes them over those that were asked for."""
    forecast: Forecast | None
    """None where the run is refused."""
    note: str = ""
    """What else there is to know: why it is refused, or what is lost."""

    @property
    def fits(self) -> bool:
        return self.forecast is not None and self.forecast.verdict == "fits"

    @property
    def needed(self) -> int:
        """Bytes at the peak, of one that is not refused."""
        assert self.forecast is not None
        return self.forecast.needed

    @property
    def what(self) -> str:
        """Its remedies, and what they change about the result."""
        return f"{', '.join(self.remedies)} ({self.harm})"


@dataclass(frozen=True)
class Remedy:
    """A way to need less memory."""

    name: str
    """In plain words."""
    harm: Harm
    change: Callable[[Look, RunConfig], Tree | None]
    """Settings to lay over a configuration, by section; None where that would change nothing, or is not for it."""


def _checkpointing(look: Look, config: RunConfig) -> Tree | None:
    engine: Any = config.engine
    scores = config.method.name == "zeroth" or engine.name == "replicas"
    return None if scores or engine.activation_checkpointing else {"engine": {"activation_checkpointing": True}}


def _rows_alone(look: Look, config: RunConfig) -> Tree | None:
    return {"data": {"pack": False}} if look.packs(config) and look.longest < config.data.max_tokens else None


def _scored_before(look: Look, config: RunConfig) -> Tree | None:
    objective: Any = config.objective
    if getattr(objective, "reference", None) == "live":
        held = objective.reference_model or config.method.name != "lora"
        return {"objective": {"reference": "precompute"}} if held else None
    if getattr(objective, "scores", None) == "live" and objective.top_k:
        return {"objective": {"scores": "precompute"}}
    return None


def _weights_in_bf16(look: Look, config: RunConfig) -> Tree | None:
    wide = config.model.precision in ("fp32", "mixed")
    return {"model": {"precision": "bf16"}} if wide and config.method.name in ("lora", "chunk") else None


def _state_in_8bit(look: Look, config: RunConfig) -> Tree | None:
    usable = config.optimizer.name == "adamw" and config.method.name in ("full", "freeze", "lora")
    return {"optimizer": {"name": "adamw8bit"}} if usable and find_spec("torchao") else None


def _smaller_chunks(look: Look, config: RunConfig) -> Tree | None:
    method: Any = config.method
    if method.name != "chunk" or method.layout != "bytes" or (method.num_chunks or NUM_CHUNKS) >= 4 * NUM_CHUNKS:
        return None
    return {"method": {"num_chunks": 4 * NUM_CHUNKS, "chunk_bytes": None, "memory": None}}


def _in_turns(look: Look, config: RunConfig) -> Tree | None:
    if config.method.name != "full":
        return None
    kept = config.optimizer.name in ("adamw", "lion", "sgd")
    return {"method": {"name": "chunk", "num_chunks": NUM_CHUNKS}} | ({} if kept else {"optimizer": {"name": "adamw"}})


def _adapter(look: Look, config: RunConfig) -> Tree | None:
    return {"method": {"name": "lora", "rank": 16}} if config.method.name in ("full", "freeze", "chunk") else None


def _scoring(look: Look, config: RunConfig) -> Tree | None:
    return None if config.method.name == "zeroth" else {"method": {"name": "zeroth"}, "optimizer": {"name": "sgd"}}


NUM_CHUNKS = 16
"""What method chunk takes by itself."""
ROWS = "smaller micro-batches"
"""The remedy that has degrees."""
IN_TURNS = "full fine-tuning in turns (chunk)"

SAME = (
    Remedy("activation checkpointing", "same result", _checkpointing),
    Remedy("one sample a row", "same result", _rows_alone),
    Remedy("reference or teacher asked before training", "same result", _scored_before),
)
"""Those that leave the update as it is. Any other may be taken together with them."""
OTHERS = (
    Remedy("weights in bf16", "result differs a little", _weights_in_bf16),
    Remedy("optimizer state in 8 bits", "result differs a little", _state_in_8bit),
    Remedy("smaller chunks", "result differs a little", _smaller_chunks),
    Remedy(IN_TURNS, "result differs a little", _in_turns),
    Remedy("LoRA of rank 16", "another method", _adapter),
    Remedy("scoring alone (zeroth)", "another method", _scoring),
)
"""In order of harm. Each stands for itself, over what was asked for."""


def nearest(forecast: Forecast, data: RunData, wanted: int = WANTED) -> list[Candidate]:
    """Configurations that fit where the foreseen one does not. data: what that trains on."""
    return [found for found in remedies(data.config, forecast.device, data, wanted) if found.remedies and found.fits]


def remedies(
    config: RunConfig, device: Device, data: RunData | None = None, wanted: int = WANTED
) -> Iterator[Candidate]:
    """First what was asked for; then, if that does not fit, what would in its place, until so many fit. Of those that do not
    each remedy's least. data: what it trains on, if that has been read. Raises UserError."""
    look = Look(config, device, data or open_data(with_engine(config)))
    first = look.at((), "same result", config)
    yield first
    if first.fits or device.memory <= device.context:
        return
    found = 0
    for candidate in _ladder(look):
        yield candidate
        found += candidate.fits
        if found == wanted:
            return
    if not found:
        yield from _shorter(look)


def more_devices(forecast: Forecast, data: RunData) -> tuple[int, int] | None:
    """(the fewest devices like that of the forecast, of one node, over which the run as it was asked for would fit; bytes that
    each would hold). data: what it trains on."""
    config, device = forecast.config, forecast.device
    engine, method, objective = config.engine, METHODS[config.method.name], OBJECTIVES[config.objective.name]
    able = method.requires <= FsdpEngine.provides and objective.reads <= FsdpEngine.reads
    if not able or device.kind == "cpu" or engine.name != "single" or device.memory <= device.context:
        return None
    if dist.is_initialized():  # ranks that are not there need a process in which there are none
        return None
    shards = FsdpConfig(activation_checkpointing=engine.activation_checkpointing)
    data = replace(data, config=config.model_copy(update={"engine": shards}))
    for world in OF_A_NODE:
        if not is_able(data.config, shards, world):
            continue
        try:
            size = needed(plan_on(data, world), device.kind)
        except (UserError, RuntimeError, ValueError):  # of what cannot be foreseen
            continue
        if size <= TIGHT * device.memory:
            return world, size
    return None


def _ladder(look: Look) -> Iterator[Candidate]:
    """What is worth a look, in order of harm."""
    yield from _same(look)
    for remedy in OTHERS:
        changed = look.changed(remedy, look.config)
        if changed is not None:
            yield _gentlest(look, remedy, changed)


def _same(look: Look) -> Iterator[Candidate]:
    """All that leave the update as it is; where they are not enough together, that which needs the least."""
    least = _least(look, (), "same result", look.config)
    if not least.fits:
        if least.remedies:
            yield least
        return
    for names, changed in _beside(look, look.config):
        if (candidate := _with_rows(look, names, "same result", changed)) is not None:
            yield candidate


def _gentlest(look: Look, remedy: Remedy, config: RunConfig) -> Candidate:
    """The remedy with as little beside it as makes it fit; if nothing does, with all."""
    least = _least(look, (remedy.name,), remedy.harm, config)
    if least.fits:
        for names, changed in _beside(look, config):
            if (candidate := _with_rows(look, (remedy.name, *names), remedy.harm, changed)) is not None:
                return candidate
    return least


def _beside(look: Look, config: RunConfig) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """Of those that leave the update as it is none; each alone; and all of them, where there are several."""
    yield (), config
    usable = [(remedy, changed) for remedy in SAME if (changed := look.changed(remedy, config)) is not None]
    for remedy, changed in usable:
        yield (remedy.name,), changed
    if len(usable) > 1:
        yield _all_same(look, config)


def _all_same(look: Look, config: RunConfig) -> tuple[tuple[str, ...], RunConfig]:
    names: tuple[str, ...] = ()
    for remedy in SAME:
        if (changed := look.changed(remedy, config)) is not None:
            names, config = (*names, remedy.name), changed
    return names, config


def _least(look: Look, names: tuple[str, ...], harm: Harm, config: RunConfig) -> Candidate:
    """With all that leaves the update as it is, one row at a time."""
    more, changed = _all_same(look, config)
    alone = look.with_rows(changed, 1)
    return look.at((*names, *more, *((ROWS,) if alone is not changed else ())), harm, alone)


def _with_rows(look: Look, names: tuple[str, ...], harm: Harm, config: RunConfig) -> Candidate | None:
    """The configuration with as many rows at once as fit: halved as often as it takes; None where one is too many."""
    whole = look.at(names, harm, config)
    if whole.fits:
        return whole
    rows = 1 if whole.forecast is None else whole.forecast.traced.rows
    fitting: Candidate | None = None
    low, high = 1, rows.bit_length() - 1
    while low <= high:
        middle = (
            high if fitting is None else (low + high) // 2
        )  # one row first: with that too little, the rest is spared
        tried = look.at((*names, ROWS), harm, look.with_rows(config, rows >> middle))
        if tried.fits:
            fitting, high = tried, middle - 1
        elif fitting is None:
            return None
        else:
            low = middle + 1
    return fitting


def _shorter(look: Look) -> Iterator[Candidate]:
    """Shorter samples, the last resort: half of the longest, as often as it takes."""
    if look.config.data.stream:
        return
    lengths, tokens = look.data.samples.lengths().max(1), look.longest // 2
    names, changed = _all_same(look, look.config)
    while tokens >= SHORTEST:
        config = laid_over(changed, {"data": {"max_tokens": tokens}, "train": {"micro_batch_tokens": tokens}})
        note = f"{(lengths > tokens).sum()} of {len(lengths)} samples are longer (data.truncation: {config.data.truncation})"
        again = replace(look, data=open_data(with_engine(config)))
        candidate = again.at((*names, "shorter samples"), "other data", config, note)
        if candidate.fits:
            yield candidate
            return
        tokens //= 2


@dataclass(frozen=True)
class Look:
    """Foresees what is near to a run, whose data is read once."""

    config: RunConfig
    device: Device
    data: RunData

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; of a stream the most there may be."""
        if self.config.data.stream:
            return self.config.data.max_tokens
        return max(int(part.lengths().max()) for part in (self.data.samples, self.data.held_out) if len(part))

    def packs(self, config: RunConfig) -> bool:
        """Whether sequences share rows. config: settled."""
        wanted = config.method.name == "zeroth" if config.data.pack is None else config.data.pack
        return wanted and self.data.can_pack

    def at(self, names: tuple[str, ...], harm: Harm, config: RunConfig, note: str = "") -> Candidate:
        """The forecast of a configuration. Raises UserError where what was asked for is refused; of others it is noted."""
        date = config.data.model_copy(update={"date": self.data.config.data.date})
        data = replace(self.data, config=with_engine(config.model_copy(update={"data": date})))
        made = Candidate(names, harm, config, overrides(self.config, config), None, note)
        try:
            with warnings.catch_warnings():  # the run itself will give them
                warnings.simplefilter("ignore")
                return replace(made, forecast=foresee(data.config, self.device, data))
        except UserError as error:
            if not names:
                raise
            return replace(made, note=str(error).splitlines()[0])

    def with_rows(self, config: RunConfig, rows: int) -> RunConfig:
        """The configuration with so many of the longest rows at once, if that is less than it has."""
        now = settled(config, self.device)
        tokens = rows * (now.data.max_tokens if self.packs(now) else min(now.data.max_tokens, self.longest))
        assert now.train.micro_batch_tokens is not None, "RunConfig fills it"
        return (
            laid_over(config, {"train": {"micro_batch_tokens": tokens}})
            if tokens < now.train.micro_batch_tokens
            else config
        )

    def changed(self, remedy: Remedy, config: RunConfig) -> RunConfig | None:
        """The configuration with a remedy; None where it is not for it, or refused by the configuration's own checks."""
        tree = remedy.change(self, settled(config, self.device))
        try:
            return None if tree is None else laid_over(config, tree)
        except UserError:
            return None


def laid_over(config: RunConfig, changes: Mapping[str, Tree]) -> RunConfig:
    """Settings over a configuration's own, by section. A section of another name begins anew, but for what optimizers share;
    another method learns at its own rate. Raises UserError."""
    tree = config.model_dump(mode="json")
    for section, settings in changes.items():
        before = tree[section]
        if settings.get("name", before.get("name")) != before.get("name"):
            shared = ("weight_decay", "betas", "eps") if settings["name"].startswith("adamw") else ()
            before = (
                {name: before[name] for name in ("lr", *shared) if name in before} if section == "optimizer" else {}
            )
        tree[section] = before | settings
    if tree["method"]["name"] != config.method.name:
        tree["optimizer"]["lr"] = None
        if config.model.precision == "mixed":  # for the sake of weights that train
            tree["model"]["precision"] = "auto"
    return config_from_dict(tree)


def overrides(before: RunConfig, after: RunConfig) -> tuple[str, ...]:
    """Settings that make the one of the other, as the command line takes them."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    renamed = [
        section
        for section, settings in new.items()
        if isinstance(settings, dict) and settings.get("name") != old[section].get("name")
    ]
    begun = {section: {"name": new[section]["name"]} for section in renamed}
    found = [f"{section}={new[section]['name']}" for section in renamed]
    usual = settings_of(config_from_dict({**old, **begun}))
    wanted = settings_of(after)
    return (*found, *(f"{name}={_as_yaml(value)}" for name, value in wanted.items() if value != usual.get(name)))


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)
