"""The beginning of a run: what it will take is foreseen before anything is loaded, and its largest batch goes first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tunesmith.config import RunConfig
from tunesmith.display import short_bytes
from tunesmith.engines.single import SingleEngine
from tunesmith.errors import UserError
from tunesmith.phases import watching
from tunesmith.plan.apart import FailedApartError, apart
from tunesmith.plan.devices import Device, host_memory, measured_rates, memory_of
from tunesmith.plan.fit import nearest
from tunesmith.plan.forecast import TIGHT, Forecast, foresee, known
from tunesmith.plan.ledger import WHOLE, Ledger
from tunesmith.plan.shards import RankLedger
from tunesmith.plan.show import in_short, time_in_words
from tunesmith.plan.show_fit import on_more_devices
from tunesmith.plan.trace import first, held_out_batch, recorded
from tunesmith.plan.worst import worst_batch
from tunesmith.run_data import RunData, open_data


class DoesNotFitError(UserError):
    """A run that takes more than there is."""

    def __init__(self, message: str, forecast: Forecast, data: RunData | None = None) -> None:
        """forecast: of the run, on a device with as much memory as there is. data: what it trains on, if that is at hand."""
        super().__init__(message)
        self.forecast, self.data = forecast, data

    def with_remedies(self) -> UserError:
        """The same with what would fit, which takes a while to find; without, where memory is too short to look for it."""
        try:
            return UserError(f"{self}\n{remedies(self.forecast, self.data or open_data(self.forecast.config))}")
        except (RuntimeError, MemoryError, OSError, UserError):
            return UserError(str(self))


def foreseen(data: RunData, engine: SingleEngine) -> Forecast | None:
    """What the run will take on the engine's device; None if that was not asked for, or cannot be known. Raises UserError;
    DoesNotFitError for a run that takes more than there is."""
    config = data.config
    if not config.train.foresee or type(engine) is not SingleEngine:
        return None
    device = device_here(engine.device, config.train.memory)
    try:
        forecast = known(data, device) or apart(foresee, config, device)
    except (UserError, FailedApartError, OSError) as error:  # a model that cannot be foreseen may well be trained
        if config.train.memory is not None:
            raise UserError(f"train.memory: what the run takes cannot be foreseen ({error}); leave it out") from error
        return None
    if forecast.margin < 0:
        raise DoesNotFitError(refusal(forecast), forecast, data)
    return forecast


def device_here(device: torch.device, memory: int | None) -> Device:
    """The engine's device. memory: what of it the run may take."""
    there = memory_of(device)
    name, kind = (torch.cuda.get_device_name(device), "cuda") if device.type == "cuda" else ("this machine", "cpu")
    return Device(name, kind, min(memory or there, there), measured_rates(kind))


def refusal(forecast: Forecast) -> str:
    """Why a run does not fit."""
    memory = short_bytes(forecast.device.memory)
    limit = f"train.memory: {memory}" if forecast.config.train.memory else f"the {memory} of {forecast.device.name}"
    return (
        f"{limit} are too little: the run would take {short_bytes(forecast.needed)} ({_largest(forecast.parts)}), as foreseen; "
        "train.foresee: false tries it all the same"
    )


def remedies(forecast: Forecast, data: RunData) -> str:
    """The nearest settings that fit, a line each."""
    found = nearest(forecast, data)
    lines = [f"  {' '.join(fit.overrides)}   {fit.what}: {short_bytes(fit.needed)}" for fit in found]
    if line := on_more_devices(forecast, data):
        lines.append(f"  {line}")
    return "\n".join(["what would fit:", *lines] if lines else ["nothing that is known would make it fit"])


def _largest(sizes: Mapping[str, int]) -> str:
    """The four largest, in words."""
    return ", ".join(
        f"{name} {short_bytes(size)}" for name, size in sorted(sizes.items(), key=lambda part: -part[1])[:4]
    )


def shown(forecast: Forecast) -> list[tuple[str, str]]:
    """For a run's header."""
    return [("foreseen", in_short(forecast)), ("", time_in_words(forecast))]


def rehearse(run: Any) -> None:
    """Let the run's largest batch, and the largest held-out one, go through the model before the first step, beside as much
    memory as the optimizer will hold. Nothing is changed by it but the run's `measured`."""
    learner = run.learner
    batch, held_out = worst_batch(run), held_out_batch(run)
    if learner.engine.world == 1:  # where ranks share a batch out, its first rows are one rank's
        batch = first(run, batch)
        held_out = None if held_out is None else first(run, held_out)
    learner.engine.seed(run.config.seed, 0)
    learner.engine.group.at(1, "rehearsal")
    with _measured(run):
        with learner.method.beside_state():
            prepared = list(run.objective.prepare(batch, run.helpers))
        for ready in prepared:
            learner.rehearse(run.objective, ready)
        if held_out is not None:
            with learner.method.beside_state():
                learner.sums(run.objective, [held_out], run.helpers)


@contextmanager
def _measured(run: Any) -> Iterator[None]:
    """Inside, the run's `measured` gets the peak of each phase: of all tensors on the CPU, of the allocator on CUDA. So much
    is known also when memory runs out."""
    device = run.learner.engine.device
    if device.type != "cuda":
        ledger = Ledger() if run.learner.engine.world == 1 else RankLedger()
        try:
            with recorded(run, ledger):
                yield
        finally:
            run.measured.update({name: peak.bytes for name, peak in ledger.peaks.items() if name})
        return

    phases = [""]

    def book() -> None:
        """What was held at most since this was last called is the present phase's."""
        if phases[-1]:
            run.measured[phases[-1]] = max(run.measured.get(phases[-1], 0), torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        book()
        phases.append(phases[-1] if phases[-1] in WHOLE else name)
        try:
            yield
        finally:
            book()
            phases.pop()

    with watching(watch):
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def out_of_memory(error: BaseException, run: Any) -> UserError:
    """What to tell of it: what was held. A DoesNotFitError, which finds what would fit, for a run that had been foreseen."""
    config: RunConfig = run.config
    lines = [f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"]
    if run.measured:
        lines.append(f"measured with the largest batch, at most: {_largest(run.measured)}")
    forecast: Forecast | None = run.forecast
    if forecast is None:
        return UserError("\n".join([*lines, HINT.format(tokens=config.train.micro_batch_tokens)]))
    lines.append(f"foreseen were {short_bytes(forecast.needed)}: {_largest(forecast.parts)}")
    there = min(_there_now(run.learner.engine.device, forecast.device), round(TIGHT * forecast.needed))
    return DoesNotFitError("\n".join(lines), replace(forecast, device=replace(forecast.device, memory=there)))


def _there_now(device: torch.device, told: Device) -> int:
    """Bytes that this process has or could have, beside what others hold."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + told.context
    return min(told.memory, host_memory())


HINT = (
    "smaller, with the same result: train.micro_batch_tokens (now {tokens}), engine.activation_checkpointing: true; or "
    "`tunesmith plan run.yaml --fit` for all that would fit"
)
