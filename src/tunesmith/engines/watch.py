"""Who is missing when ranks wait in vain: each tells torch's store how far it has come, and reads there of the others."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from time import monotonic, sleep

import torch.distributed as dist

from tunesmith.engines.checkpoint import first_line
from tunesmith.errors import PeerError

GRACE_S = 5.0
"""Ranks that wait for the same one give up at nearly the same time: who has not done so after this is missing."""
ANSWER_S = 10.0
"""The store lives in a process which may itself be the one that hangs."""


class Watch:
    """What this rank tells of itself, and what it says when others do not come."""

    def __init__(self, store: dist.Store | None, rank: int, world: int, timeout_s: float) -> None:
        """store: None where there is one rank."""
        self.store, self.rank, self.world, self.timeout_s = store, rank, world, timeout_s
        self.step, self.doing = 0, "start"

    def at(self, step: int, doing: str) -> None:
        """Now at this update, counted from 1."""
        self.step, self.doing = step, doing
        if self.store is not None:
            self.store.set(f"at/{self.rank}", f"{doing} of step {step}")

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Inside, a collective that fails becomes a PeerError that names the ranks it waited for; other errors are told to the
        others."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            collective = collective_of(error)
            if collective is None or self.store is None:
                self._leave(error)
                raise
            raise PeerError(self._explain(collective, error)) from error
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        self._ask(lambda store: store.set(f"ended/{self.rank}", first_line(error)))

    def _explain(self, collective: str, error: Exception) -> str:
        late = any(word in str(error).lower() for word in ("timed out", "timeout"))
        waited = f"did not come to {collective} within {self.timeout_s:g} s" if late else f"is gone from {collective}"
        found: dict[int, str] = {}
        problem = self._ask(lambda store: found.update(self._look(store)))
        if problem:
            keeper = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            said = [f"{keeper}, which knows how far the others are, {problem}, and {collective} failed"]
        else:
            said = [
                f"rank {rank} {last}" if last.startswith("ended") else f"rank {rank} {waited} (last seen in {last})"
                for rank, last in sorted(found.items())
            ] or [
                f"the others waited for this rank in vain, or their network failed ({collective}: {first_line(error)})"
            ]
        return (
            f"step {self.step}, {self.doing}: {'; '.join(said)}. The run has stopped: see what that rank says, and go on with "
            "--resume; if it was only slow, raise engine.timeout_s"
        )

    def _look(self, store: dist.Store) -> dict[int, str]:
        """Of each rank that is missing why, or where it was seen last."""
        store.set(f"waits/{self.rank}", "")
        deadline = monotonic() + GRACE_S
        others = set(range(self.world)) - {self.rank}
        while True:
            here = {rank for rank in others if store.check([f"waits/{rank}"])}
            gone = {rank for rank in others - here if store.check([f"ended/{rank}"])}
            if here | gone == others or monotonic() > deadline:
                break
            sleep(0.05)
        told = {rank: f"ended: {store.get(f'ended/{rank}').decode()}" for rank in gone}
        for rank in others - here - gone:
            seen = store.check([f"at/{rank}"])
            told[rank] = store.get(f"at/{rank}").decode() if seen else "nothing"
        store.set(f"read/{self.rank}", "")
        if self.rank == 0:  # the store may end with this process
            while not all(store.check([f"read/{rank}"]) for rank in here) and monotonic() < deadline:
                sleep(0.05)
        return told

    def _ask(self, question: Callable[[dist.Store], None]) -> str | None:
        """Ask the store, which may be gone or hang: then it says so."""
        if self.store is None:
            return None
        store, problem = self.store, ["does not answer"]

        def ask() -> None:
            try:
                question(store)
                problem.clear()
            except (RuntimeError, dist.DistError):
                problem[0] = "has ended"

        thread = Thread(target=ask, name="watch", daemon=True)
        thread.start()
        thread.join(GRACE_S + ANSWER_S)
        return problem[0] if problem else None


def collective_of(error: BaseException) -> str | None:
    """Name of the collective in which an error arose; None if it is no failure of one."""
    inside = [
        frame.name
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith(("distributed_c10d.py", "_functional_collectives.py"))
    ]
    if inside:
        return inside[-1]
    return "a collective" if isinstance(error, dist.DistError) or "gloo" in str(error) else None
