"""What a run will take on a device: bytes at the peak, seconds of a step, hours, energy and money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tunesmith.config import RunConfig
from tunesmith.data.dataset import Dataset
from tunesmith.engines import with_engine
from tunesmith.methods import METHODS
from tunesmith.plan import kept
from tunesmith.plan.devices import Device, Rates
from tunesmith.plan.ledger import Work
from tunesmith.plan.trace import Traced
from tunesmith.run_data import RunData, open_data

GAPS = {"cuda": 0.05, "cpu": 0.05}
"""Share of what comes and goes that the allocator holds beside it, an estimate: rounding, and gaps between blocks."""
GAPS_OF_KEPT = 0.75
"""The same on a CPU where freed memory is kept, which is faster: as it is without `train.memory`."""
SLOW_LAUNCHES = 2.0
"""Times that of a small operation alone, where others' code runs between them."""
TIGHT = 0.95
"""From this share of the device's memory on, a run fits only if nothing else is there."""

Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

    config: RunConfig
    device: Device
    precision: str
    traced: Traced
    steps: int
    samples: int
    """Of a step."""
    tokens: float
    """Of a step, on average, without padding."""

    @property
    def parts(self) -> dict[str, int]:
        """What is held at the peak, by what it is for, with what surrounds torch's tensors."""
        peak = self.traced.peak
        moving = sum(size for kind, size in peak.kinds.items() if kind not in HELD)
        large = {kind: size for kind, size in peak.kinds.items() if size >= 1024}
        found = {kind: large[kind] for kind in (*ORDER, *large) if kind in large}
        keeps = self.device.kind == "cpu" and self.config.train.memory is None
        gaps = GAPS_OF_KEPT if keeps else GAPS[self.device.kind]
        return found | {"allocator": round(gaps * moving), "context": self.device.context}

    @property
    def needed(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def margin(self) -> int:
        """Bytes that are left over."""
        return self.device.memory - self.needed

    @property
    def verdict(self) -> Verdict:
        if self.margin < 0:
            return "does not fit"
        return "fits" if self.needed <= TIGHT * self.device.memory else "tight"

    @property
    def step_s(self) -> tuple[float, float] | None:
        """Seconds of an average step, from … to; None where nothing is known of the device's speed."""
        rates = self.device.rates
        if rates is None:
            return None
        of_update = self._seconds(self.traced.update, rates)
        low, high = (
            self.passes * of_work + update
            for of_work, update in zip(self._seconds(self.traced.work, rates), of_update, strict=True)
        )
        return low, high

    @property
    def passes(self) -> float:
        """How often an average step computes what was traced, but for the update."""
        return self.traced.step_tokens / self.traced.tokens

    @property
    def flops(self) -> float:
        """Of an average step."""
        return self.passes * self.traced.work.flops + self.traced.update.flops

    def _seconds(self, work: Work, rates: Rates) -> tuple[float, float]:
        tflops = rates.fp32 if self.precision == "fp32" else rates.bf16
        seconds = work.flops / tflops / 1e12 + work.moved / rates.bandwidth / 1e9
        launches = work.operations * rates.launch_us / 1e6
        slow, fast = rates.reach
        carrying = work.carried / rates.link / 1e9  # beside what the device computes
        return max(seconds / fast, launches, carrying), max(seconds / slow, SLOW_LAUNCHES * launches, carrying)

    @property
    def run_s(self) -> tuple[float, float] | None:
        """Seconds of all steps, without loading, evaluation and saving."""
        return None if self.step_s is None else (self.steps * self.step_s[0], self.steps * self.step_s[1])


HELD = ("weights", "adapter", "optimizer state", "reference and teacher", "gradients", "on the host")
"""Kinds that stay in place from step to step, without gaps."""
ORDER = (
    "weights", "adapter", "reference and teacher", "optimizer state", "gradients", "activations", "activations, computed again",
    "logits and loss", "backward pass", "update", "evaluation", "generation", "saving",
)  # fmt: skip


def foresee(config: RunConfig, device: Device, data: RunData | None = None) -> Forecast:
    """Plan a run on one device. data: what it trains on, if that has been read. Raises UserError."""
    data = as_foreseen(data or open_data(with_engine(config)), device)
    return _forecast(data, device, kept.traced(data, data.config.model.precision, device.kind))


def known(data: RunData, device: Device) -> Forecast | None:
    """The same if it has been asked before; else None."""
    data = as_foreseen(data, device)
    traced = kept.known(data, data.config.model.precision, device.kind)
    return None if traced is None else _forecast(data, device, traced)


def _forecast(data: RunData, device: Device, traced: Traced) -> Forecast:
    config = data.config
    samples = config.train.batch_size
    if isinstance(data.batches, Dataset):
        tokens = data.batches.epoch_tokens / data.batches.epoch_samples * samples
    else:
        tokens = float(data.samples.lengths().sum(1).mean()) * samples
    return Forecast(config, device, config.model.precision, traced, data.steps, samples, tokens)


def as_foreseen(data: RunData, device: Device) -> RunData:
    """The data with its run's settings settled."""
    return replace(data, config=settled(data.config, device))


def settled(config: RunConfig, device: Device) -> RunConfig:
    """The configuration with what is found out when a run begins there: its precision, and whether sequences share rows."""
    precision = {"precision": foreseen_precision(config, device.rates)}
    pack = {} if config.data.pack is not None or device.kind == "cpu" else {"pack": True}
    return config.model_copy(
        update={"model": config.model.model_copy(update=precision), "data": config.data.model_copy(update=pack)}
    )


def foreseen_precision(config: RunConfig, rates: Rates | None) -> str:
    """What `model.precision: auto` comes to on a device of these rates; of unknown ones, if it multiplies bf16 fast."""
    if config.model.precision != "auto":
        return config.model.precision
    if rates is not None and rates.bf16 < rates.fp32 / 0.75:
        return "fp32"
    return "mixed" if METHODS[config.method.name].needs_fp32_weights(config.method) else "bf16"


def energy_kwh(forecast: Forecast) -> tuple[float, float] | None:
    """Of the device at full power."""
    if forecast.run_s is None or forecast.device.watts is None:
        return None
    low, high = (seconds / 3.6e6 * forecast.device.watts for seconds in forecast.run_s)
    return low, high


def as_numbers(forecast: Forecast) -> Mapping[str, object]:
    """For a manifest."""
    return {
        "device": forecast.device.name,
        "memory_bytes": forecast.device.memory,
        "needed_bytes": forecast.needed,
        "phase": forecast.traced.phase,
        "parts": forecast.parts,
        "peaks": {name: peak.bytes for name, peak in forecast.traced.peaks.items()},
        "step_s": forecast.step_s,
    }
