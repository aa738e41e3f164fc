"""The beginning of a run: what it will take is foreseen before anything is loaded, and its largest batch goes first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tunesmith.config import RunConfig
from tunesmith.data.dataset import Dataset
from tunesmith.display import short_bytes
from tunesmith.engines.single import SingleEngine
from tunesmith.errors import UserError
from tunesmith.phases import watching
from tunesmith.plan.apart import FailedApartError, apart
from tunesmith.plan.devices import Device, measured_rates, memory_of
from tunesmith.plan.fit import nearest
from tunesmith.plan.forecast import Forecast, foresee, known
from tunesmith.plan.ledger import WHOLE, Ledger
from tunesmith.plan.shards import RankLedger
from tunesmith.plan.show import in_short, time_in_words
from tunesmith.plan.show_fit import on_more_devices
from tunesmith.plan.trace import first, held_out_batch, recorded
from tunesmith.plan.worst import worst_batch
from tunesmith.run_data import RunData
from tunesmith.tensors import bytes_here, local_part


def foreseen(data: RunData, engine: SingleEngine) -> Forecast | None:
    """What the run will take on the engine's device; None if that was not asked for, or cannot be known. Raises UserError, with
    what would help, for a run that takes more than there is."""
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
        raise UserError(refusal(forecast, data))
    return forecast


def device_here(device: torch.device, memory: int | None) -> Device:
    """The engine's device. memory: what of it the run may take."""
    there = memory_of(device)
    name, kind = (torch.cuda.get_device_name(device), "cuda") if device.type == "cuda" else ("this machine", "cpu")
    return Device(name, kind, min(memory or there, there), measured_rates(kind))


def refusal(forecast: Forecast, data: RunData) -> str:
    """Why a run does not fit, and what would."""
    parts = ", ".join(f"{name} {short_bytes(size)}" for name, size in _largest(forecast.parts))
    memory = short_bytes(forecast.device.memory)
    limit = f"train.memory: {memory}" if data.config.train.memory else f"the {memory} of {forecast.device.name}"
    return (
        f"{limit} are too little: the run would take {short_bytes(forecast.needed)} ({parts}), as foreseen; train.foresee: "
        "false tries it all the same\n" + remedies(forecast, data)
    )


def remedies(forecast: Forecast, data: RunData) -> str:
    """The nearest settings that fit, a line each."""
    found = nearest(forecast, data)
    lines = [f"  {' '.join(fit.overrides)}   {fit.what}: {short_bytes(fit.needed)}" for fit in found]
    if line := on_more_devices(forecast, data):
        lines.append(f"  {line}")
    return "\n".join(["what would fit:", *lines] if lines else ["nothing that is known would make it fit"])


def _largest(parts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(parts.items(), key=lambda part: -part[1])[:4]


def shown(forecast: Forecast) -> list[tuple[str, str]]:
    """For a run's header."""
    return [("foreseen", in_short(forecast)), ("", time_in_words(forecast))]


def rehearse(run: Any) -> dict[str, int]:
    """Let the run's largest batch, and the largest held-out one, go through the model before the first step, beside as much
    memory as the optimizer will hold. Nothing is changed by it. Returns bytes at the peak, by phase."""
    learner = run.learner
    batch, held_out = worst_batch(run), held_out_batch(run)
    if learner.engine.world == 1:  # where ranks share a batch out, its first rows are one rank's
        batch = first(run, batch)
        held_out = None if held_out is None else first(run, held_out)
    learner.engine.seed(run.config.seed, 0)
    learner.engine.group.at(1, "rehearsal")
    missing = _missing_state(learner)
    with _measured(run) as peaks:
        room = torch.zeros(missing, dtype=torch.uint8, device=learner.engine.device)
        for ready in run.objective.prepare(batch, run.helpers):
            learner.rehearse(run.objective, ready)
        if held_out is not None:
            learner.sums(run.objective, [held_out], run.helpers)
        del room
    return {name: size for name, size in peaks.items() if name}


def _missing_state(learner: Any) -> int:
    """Bytes of optimizer state that the first update will make."""
    own = {name: local_part(p.detach()) for name, p in learner.method.active().items()}
    if any(p.device != learner.engine.device for p in own.values()):  # it waits in the host's memory
        return 0
    shapes = {name: (p.numel(), p.element_size()) for name, p in own.items()}
    there = bytes_here(learner.method.states())
    return int(max(0, learner.method.memory(shapes).optimizer_bytes - there))


@contextmanager
def _measured(run: Any) -> Iterator[dict[str, int]]:
    """Peaks by phase, filled in at the end: of all tensors on the CPU, of the allocator on CUDA."""
    peaks: dict[str, int] = {}
    device = run.learner.engine.device
    if device.type != "cuda":
        ledger = Ledger() if run.learner.engine.world == 1 else RankLedger()
        with recorded(run, ledger):
            yield peaks
        peaks |= {name: peak.bytes for name, peak in ledger.peaks.items()}
        return

    phases = [""]

    def book() -> None:
        """What was held at most since this was last called is the present phase's."""
        peaks[phases[-1]] = max(peaks.get(phases[-1], 0), torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        book()
        phases.append(phases[-1] if phases[-1] in WHOLE else name)
        yield
        book()
        phases.pop()

    with watching(watch):
        yield peaks


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def out_of_memory(error: BaseException, run: Any) -> UserError:
    """What to tell of it: what was held, and what would help."""
    config: RunConfig = run.config
    lines = [f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"]
    forecast: Forecast | None = run.forecast
    if forecast is not None:
        parts = ", ".join(f"{name} {short_bytes(size)}" for name, size in _largest(forecast.parts))
        lines.append(f"foreseen were {short_bytes(forecast.needed)}: {parts}")
    if isinstance(run.data, Dataset):
        lines.append(HINT.format(tokens=config.train.micro_batch_tokens))
    return UserError("\n".join(lines))


HINT = (
    "smaller, with the same result: train.micro_batch_tokens (now {tokens}), engine.activation_checkpointing: true; or "
    "`tunesmith plan run.yaml --fit` for all that would fit"
)
