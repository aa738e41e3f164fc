"""The whole state, from time to time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from threading import Thread
from time import perf_counter
from typing import Any

import psutil
from torch import Tensor

from tunesmith.config import CheckpointConfig
from tunesmith.engines.checkpoint import NotWritten
from tunesmith.hooks.log import Log
from tunesmith.learner import Learner
from tunesmith.objectives import Objective
from tunesmith.phases import phase
from tunesmith.run_folder import RunFolder
from tunesmith.tensors import bytes_here, copied


class Checkpoint:
    """Saves when so many steps are done or minutes have passed. `saved`: the step of the newest checkpoint so far; `log`: None
    on ranks that give their part, and leave it to another one to tell of it.

    One that is written beside the training is there, or has failed, when all ranks have seen its end: at a later step, before
    the next one, or at the end of the run."""

    def __init__(
        self, folder: RunFolder, log: Log | None, config: CheckpointConfig, objective: Objective, saved: int
    ) -> None:
        self.folder, self.log, self.config, self.objective = folder, log, config, objective
        self.saved, self.since = saved, perf_counter()
        self.lenient = config.on_failure == "continue"
        self.written: tuple[int, Future[None]] | None = None

    def __call__(self, step: int, metrics: Mapping[str, Tensor], learner: Learner) -> None:
        group = learner.engine.group
        if self.written is not None and not group.agree(int(not self.written[1].done())):
            self.settle(self.lenient)
        every_steps, every_s = self.config.every_steps, 60 * self.config.every_minutes
        due = bool(every_steps) and step % every_steps == 0
        if not due and every_s:  # clocks differ
            due = bool(group.agree(perf_counter() - self.since >= every_s))
        if due:
            self.save(step, learner)

    def save(self, step: int, learner: Learner, is_last: bool = False, lenient: bool = True) -> None:
        """Save now, unless this step is saved already. is_last: there is nothing to do beside it. lenient: whether a failure
        may be told only, if it is so configured."""
        self.settle(self.lenient)
        if step == self.saved:
            return
        engine = learner.engine
        engine.group.at(step, "checkpoint")
        with phase("saving"):
            state = learner.method.state_dict() | {"objective": self.objective.state_dict()}
            beside = not is_last and self._goes_beside(state, learner)
            state = copied(state) if beside else state
        write = partial(engine.save_checkpoint, self.folder.checkpoints, step, state, self.config.keep)
        # ranks that have lost another one end without waiting for what cannot be completed
        self.written = step, _run(write, beside, daemon=engine.group.world > 1)
        self.since = perf_counter()
        if not beside:
            self.settle(lenient and self.lenient)
        elif self.log is not None:
            self.log.pause()

    def _goes_beside(self, state: dict[str, Any], learner: Learner) -> bool:
        """Whether it is to be written beside the training, and all ranks have memory for that."""
        wanted = self.config.asynchronous
        if wanted is None:
            wanted = learner.engine.device.type != "cpu"
        if not wanted:
            return False
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", learner.engine.group.world))
        has_room = bytes_here(state) * ranks_here < psutil.virtual_memory().available
        return not learner.engine.group.agree(int(not has_room))

    def settle(self, lenient: bool) -> None:
        """Wait for what is being written. lenient: a failure is told, and does not stop the run."""
        if self.written is None:
            return
        (step, written), self.written = self.written, None
        error = written.exception()
        if error is None:
            self.saved = step
            if self.log is not None:
                self.log.events.write("checkpoint", step=step)
        elif not lenient or not isinstance(error, NotWritten):
            raise error
        elif self.log is not None:
            self.log.events.write("checkpoint_failed", step=step, why=error.what)
            self.log.progress.say(f"warning: {error.what}; the run goes on, and the checkpoints before it are intact")
        if self.log is not None:
            self.log.pause()


def _run(work: Callable[[], None], beside: bool, daemon: bool) -> Future[None]:
    """What becomes of the work, done now or in a thread."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:  # raised again by who asks for the result
            future.set_exception(error)

    if beside:
        Thread(target=run, name="checkpoint", daemon=daemon).start()
    else:
        run()
    return future
