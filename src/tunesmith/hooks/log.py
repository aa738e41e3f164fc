"""Every step to events.jsonl; from the same record to the terminal and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

from torch import Tensor

from tunesmith.display import Progress
from tunesmith.learner import Learner
from tunesmith.run_folder import EventLog

WHOLE_NUMBERS = ("target_tokens", "tokens")


class Log:
    """A step event every `every` steps; tokens per second are those of the steps since the last one."""

    def __init__(self, events: EventLog, progress: Progress, every: int) -> None:
        self.events, self.progress, self.every = events, progress, every
        self.since, self.tokens = perf_counter(), 0

    def __call__(self, step: int, metrics: Mapping[str, Tensor], learner: Learner) -> None:
        self.tokens += int(metrics["tokens"])
        if step % self.every:
            return
        now = perf_counter()
        event = {name: int(v) if name in WHOLE_NUMBERS else float(v) for name, v in metrics.items()}
        event["tokens_per_s"] = round(self.tokens / (now - self.since), 1)
        event["memory_bytes"] = learner.engine.memory_bytes()
        self.since, self.tokens = now, 0
        self.events.write("step", step=step, **event)
        self.progress.step(step, event)

    def pause(self) -> None:
        """Leave out what other hooks took: the next step's speed counts from now."""
        self.since = perf_counter()
