"""torch elastic, which starts the ranks of a host, watches them, and starts all again when one dies."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from types import FrameType
from typing import Any

import psutil
from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, LogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from tunesmith.engines.place import JOB
from tunesmith.errors import UserError
from tunesmith.interrupt import REPEAT_S
from tunesmith.launch import AGAIN, MENDABLE, STOPPED

GRACE_S = 10.0
"""What ranks have to say why they end, after one of them has ended with an error."""
END_S = 60.0
"""How long a host whose ranks are done waits for the others. Python hears of no signal meanwhile."""
ANSWER_S = 30.0
"""How long the place where hosts meet may take to answer at first."""
STORE_S = 60
"""How long an answer of the rendezvous may take."""


@dataclass(frozen=True)
class Job:
    """Ranks on one or several hosts that work on one run."""

    name: str
    """Under which it can be started again to go on; empty: this launch alone goes on with what it began."""
    number: int
    """Ranks of this host."""
    nodes: int
    endpoint: str
    """HOST:PORT of the rendezvous."""
    is_host: bool
    """Whether it is held in this process."""
    address: str
    """By which the other hosts reach this one."""
    max_restarts: int
    timeout_s: int
    """How long hosts wait for each other, at the start and at a restart."""


def run_agent(job: Job, command: tuple[str, ...], tell: Callable[[str], None]) -> int:
    """The command on all ranks of this host, to the end; returns the exit code. Raises UserError."""
    if "LOGLEVEL" not in os.environ:  # which asks for what elastic itself has to say
        logging.getLogger("torch.distributed.elastic").propagate = False
        logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        agent = Agent(job, _spec(job, command), folder, tell)
        handlers = {number: signal.signal(number, agent.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        closes = True
        try:
            result = agent.run()
        except KeyboardInterrupt:
            closes = False  # other hosts may go on, and this one come back
            return STOPPED
        except SignalException as error:
            closes = False
            return 128 + error.sigval
        except RendezvousClosedError as error:
            raise UserError("the run has ended for good on another host; see what it says there") from error
        except RendezvousTimeoutError as error:
            raise UserError(
                f"--rendezvous {job.endpoint}: not all {job.nodes} hosts have come within {job.timeout_s} s; start the same "
                "command on each of them, or raise --rendezvous-timeout"
            ) from error
        except (RendezvousError, DistError) as error:
            closes = False
            raise UserError(
                f"--rendezvous {job.endpoint}: is no longer there; if the run has not ended on that host, start the same "
                "command again here, and it goes on from its last checkpoint"
            ) from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if closes:
                agent.spec.rdzv_handler.shutdown()
    return agent.exit_code(result)


def _spec(job: Job, command: tuple[str, ...]) -> WorkerSpec:
    configs = {"is_host": job.is_host, "read_timeout": STORE_S, "join_timeout": job.timeout_s}
    parameters = RendezvousParameters(
        "c10d", job.endpoint, job.name or "tunesmith", job.nodes, job.nodes, local_addr=job.address, **configs
    )
    if not job.is_host and not _answers(job.endpoint):
        raise UserError(
            f"--rendezvous {job.endpoint}: what listens there is no rendezvous of tunesmith; if another program has the port, "
            "give one that is free"
        )
    return WorkerSpec(
        role="tunesmith",
        local_world_size=job.number,
        entrypoint=command[0],
        args=command[1:],
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=job.max_restarts,
        monitor_interval=0.1,
        local_addr=job.address,
    )


def _answers(endpoint: str) -> bool:
    """Whether a store of torch listens there. Asked aside, since torch waits for ever for another program to answer."""
    host, _, port = endpoint.rpartition(":")
    answered = threading.Event()

    def ask() -> None:
        with suppress(DistError):
            TCPStore(host, int(port), wait_for_workers=False, timeout=timedelta(seconds=ANSWER_S))
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(ANSWER_S)


class Streams(LogsSpecs):
    """Rank 0 has the terminal; what other ranks say comes line by line with the rank before it."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        tee = {local: Std.NONE if env["RANK"] == "0" else Std.ALL for local, env in envs.items()}
        return DefaultLogsSpecs(self.folder, tee=tee).reify(envs)

    @property
    def root_log_dir(self) -> str:
        return self.folder


class Agent(LocalElasticAgent):
    """torch's agent, with three things of its own about ranks that end.

    It lets all come to their end when a signal stops the run. It starts none again after an error that only the user can
    mend. And it tells in a line what has happened.
    """

    def __init__(self, job: Job, spec: WorkerSpec, folder: str, tell: Callable[[str], None]) -> None:
        super().__init__(spec, Streams(folder), exit_barrier_timeout=END_S, log_line_prefix_template="rank ${rank}: ")
        self.job, self.spec, self.tell = job, spec, tell
        self.name = job.name or uuid.uuid4().hex
        self.signalled: float | None = None
        self.failed: float | None = None
        self.starts = 0
        self.ends: dict[int, int] = {}
        """Exit codes of ranks that have ended by themselves, by rank."""
        self.has_told = False
        self.trace = ""
        """What was told last of where a rank failed: once is enough."""

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass it on to the ranks, which save and end. A second one ends them at once, and so does one while there are none."""
        ranks = psutil.Process().children()
        if self.signalled is None:
            self.signalled = monotonic()
        elif monotonic() - self.signalled < REPEAT_S:
            return
        else:
            number = signal.SIGKILL
        for rank in ranks:
            rank.send_signal(number)
        if not ranks:
            raise KeyboardInterrupt

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self.starts and not self.has_told:
            self.tell("the ranks of another host have come new: all start again, from the last checkpoint")
        self.starts += 1
        self.failed, self.ends, self.has_told = None, {}, False
        if not self.job.name:  # then that of the process where the hosts meet counts, which is there in every round
            assert worker_group.store is not None, "elastic sets it before"
            if self.job.is_host:
                worker_group.store.set(JOB, self.name)
            self.name = worker_group.store.get(JOB).decode()
        os.environ[JOB] = self.name
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = {worker.global_rank: _ended(worker.id) for worker in worker_group.workers}
        self.ends = {rank: code for rank, code in codes.items() if code is not None}
        running = [worker for worker in worker_group.workers if codes[worker.global_rank] is None]
        if any(code not in (0, STOPPED) for code in self.ends.values()):
            self.failed = self.failed or monotonic()
            was_killed = min(self.ends.values()) < 0
            if running and not was_killed and monotonic() - self.failed < GRACE_S:
                return RunResult(WorkerState.HEALTHY)
            for worker in running:  # they wait for one that is no more, and what they hold is in the checkpoint
                os.killpg(worker.id, signal.SIGKILL)
            result = super()._monitor_workers(worker_group)
            self._tell_failure(result.failures)
            return result
        if running:
            return RunResult(WorkerState.HEALTHY)
        super()._monitor_workers(worker_group)  # which ends what belongs to them
        return RunResult(WorkerState.SUCCEEDED, return_values=dict(self.ends))

    def _tell_failure(self, failures: Mapping[int, ProcessFailure]) -> None:
        """One line for what has happened, and no restart where it would happen again."""
        rank, code = min(self.ends.items(), key=lambda end: (_weight(end[1]), end[0]))
        failure = failures[rank]
        if code == MENDABLE:
            self._remaining_restarts = 0
            self.tell(f"error: {f'rank {rank}: ' if rank else ''}{_message(failure)}")
        elif self.signalled is not None:
            self._remaining_restarts = 0
        else:
            number, most = 1 + self.spec.max_restarts - self._remaining_restarts, self.spec.max_restarts
            then = (
                f"all ranks start again, from the last checkpoint (restart {number} of {most})"
                if self._remaining_restarts
                else "the run has stopped; go on with it with --resume"
                + (f" (after {most} restarts, see --max-restarts)" if most else "")
            )
            trace = _trace(failure)
            self.tell(
                f"{'warning' if self._remaining_restarts else 'error'}: rank {rank} {_what(failure)}; {then}"
                + (f"\n{trace}" if trace != self.trace else "")
            )
            self.trace = trace
        self.has_told = True

    def exit_code(self, result: RunResult | None) -> int:
        """Of the launcher, after `run`."""
        codes = self.ends.values()
        if MENDABLE in codes:
            return MENDABLE
        if self.signalled is not None or STOPPED in codes:
            return STOPPED
        return 0 if result is not None and not result.is_failed() else 1


def _ended(pid: int) -> int | None:
    """Exit code of a child, or minus the signal that has killed it; None while it runs. It stays to be waited for."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _weight(code: int) -> int:
    """Which of several ends is the cause of the others, first the likeliest."""
    order = {MENDABLE: 0, AGAIN: 3, 0: 4, STOPPED: 4}
    return order.get(code, 1 if code < 0 else 2)


def _message(failure: ProcessFailure) -> str:
    """What the rank has left, without the error's type."""
    message = failure.error_file_data["message"]
    text = message if isinstance(message, str) else message["message"]
    return text.partition(": ")[2]


def _what(failure: ProcessFailure) -> str:
    """What has become of a rank that was not to end."""
    if failure.exitcode < 0:
        return f"was killed by {failure.signal_name()}" + (
            " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        )
    message = failure.error_file_data.get("message")
    if not isinstance(message, dict):
        return f"ended with exit code {failure.exitcode}"
    return f"ended: {_message(failure)}" if failure.exitcode == AGAIN else f"failed: {message['message']}"


def _trace(failure: ProcessFailure) -> str:
    """Where in the code a rank failed that was not meant to; empty if nothing is known of it."""
    message = failure.error_file_data.get("message")
    if not isinstance(message, dict) or failure.exitcode == AGAIN:
        return ""
    return message["extraInfo"]["py_callstack"].rstrip()
