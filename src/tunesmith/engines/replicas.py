"""The whole model on every rank. What the ranks exchange is scalars, so they may sit on any machines that reach each other."""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from time import monotonic
from typing import Any, ClassVar

import torch

from tunesmith.engines.group import Group, check_alike
from tunesmith.engines.place import place
from tunesmith.engines.single import SingleEngine
from tunesmith.errors import PeerError

START_S = 600.0
"""How long ranks wait for each other at the start, while some still read data or rehearse."""
REPLAY_S = 12 * 3600.0
"""The same while each makes its weights anew from the log of a run that is resumed."""
SLICE_S = 5.0
"""How long a wait keeps Python from looking at signals."""
GRACE_S = 5.0
"""What rank 0 may take to write a checkpoint, say, beside its own scoring and its wait for others."""


class Star(Group):
    """Rank 0 gathers what all ranks say, and tells all of it to all, through torch's TCPStore.

    A collective of gloo or NCCL would be as fast for a few numbers, but hangs or fails for good when a rank dies. Here only
    rank 0 waits for others, each for itself: one that does not come in time is left out from then on.
    """

    def __init__(self, timeout_s: float, check_every: int) -> None:
        here = place()
        self.rank, self.world = here.rank, here.world
        self.ranks = (self.rank,)
        self.timeout_s, self.check_every = timeout_s, check_every
        self.store: Any = None
        self.round = 0
        self.lost: list[tuple[int, str]] = []
        self.wish: Callable[[], bool] = lambda: False
        self.stopping = False

    @classmethod
    def rank_here(cls) -> int:
        return place().rank

    @contextmanager
    def joined(self, facts: Mapping[str, Any]) -> Iterator[None]:
        if self.world == 1:
            yield
            return
        self.store = _connect(self.rank, self.world)
        self.ranks = tuple(range(self.world))
        try:
            answers = self._exchange(dict(facts), START_S)
            if missing := ", ".join(str(rank) for rank in range(self.world) if rank not in answers):
                raise PeerError(
                    f"engine: replicas: of {self.world} ranks {missing} did not come within {START_S:g} s; "
                    "see what they say, and start all again"
                )
            check_alike(answers)
            yield
        except Exception as error:
            self._leave(" ".join(str(error).split()) or type(error).__name__)
            raise
        self._leave("done")

    def hand_over(self, give: Callable[[], bytes], take: Callable[[bytes], None]) -> None:
        if self.store is None:
            return
        given = self._exchange(b64encode(give()).decode() if self.rank == 0 else None, REPLAY_S)
        if self.rank:
            take(b64decode(given[0]))
        self._exchange(None, REPLAY_S)

    def meet(self) -> None:
        self._exchange(None, max(self.timeout_s, START_S))

    def gather(self, numbers: Any) -> dict[int, Any]:
        return self._exchange(numbers, self.timeout_s)

    def heed(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        if self.store is None:
            return stop
        self.wish = stop
        return lambda: self.stopping

    def pop_lost(self) -> list[tuple[int, str]]:
        lost, self.lost = self.lost, []
        return lost

    def _exchange(self, numbers: Any, timeout_s: float) -> dict[int, Any]:
        """One round: numbers in, the numbers of all ranks that are there out."""
        if self.store is None:
            return {self.rank: numbers}
        from torch.distributed import DistNetworkError

        self.round += 1
        own = {"numbers": numbers, "stop": self.wish()}
        try:
            text = self._collect(own, timeout_s) if self.rank == 0 else self._ask(own, timeout_s)
        except DistNetworkError as error:
            self.store = None
            raise PeerError(
                "rank 0 is gone, which keeps the run's log: the run has stopped; go on with it from there with --resume"
            ) from error
        found = {int(rank): answer for rank, answer in json.loads(text).items()}
        if "left" in found[0]:
            self.store = None
            raise PeerError(f"rank 0 ended: {found[0]['left']}")
        if self.rank not in found:
            raise self._dropped()
        self.ranks = tuple(found)
        self.stopping = self.stopping or any(answer["stop"] for answer in found.values())
        return {rank: answer["numbers"] for rank, answer in found.items()}

    def _collect(self, own: dict[str, Any], timeout_s: float) -> str:
        """Rank 0: wait for the others, drop who does not come, publish. The store keeps the last round's keys alone."""
        deadline = monotonic() + timeout_s
        found = {0: own}
        for rank in self.ranks[1:]:
            key = f"{self.round}/{rank}"
            if not self._arrives(key, deadline - monotonic()):
                self._drop(rank, f"said nothing for {timeout_s:g} s")
                continue
            answer = json.loads(self.store.get(key))
            self.store.delete_key(key)
            if "left" in answer:
                self._drop(rank, f"ended: {answer['left']}")
            else:
                found[rank] = answer
        text = json.dumps(found)
        self.store.set(str(self.round), text)
        self.store.delete_key(str(self.round - 1))  # all have read it, who have come to this round
        return text

    def _ask(self, own: dict[str, Any], timeout_s: float) -> str:
        """The other ranks: say something, and wait for what rank 0 makes of it."""
        self.store.set(f"{self.round}/{self.rank}", json.dumps(own))
        deadline = monotonic() + 2 * timeout_s + GRACE_S  # rank 0 scores as long as this one, and waits for others
        while not self.store.check([f"dropped/{self.rank}"]):
            if self._arrives(str(self.round), min(SLICE_S, deadline - monotonic())):
                return self.store.get(str(self.round)).decode()
            if monotonic() >= deadline:
                raise PeerError(
                    f"rank 0 has said nothing for {2 * timeout_s + GRACE_S:g} s: the run has stopped; go on with it with "
                    "--resume, and if rank 0 was only slow, raise engine.timeout_s"
                )
        raise self._dropped()

    def _arrives(self, key: str, timeout_s: float) -> bool:
        """Whether a key is there, or comes within so many seconds."""
        from torch.distributed import DistStoreError

        deadline = monotonic() + timeout_s
        while True:
            seconds = min(SLICE_S, max(0.01, deadline - monotonic()))
            try:
                self.store.wait([key], timedelta(seconds=seconds))
            except DistStoreError:  # torch's way to say: not yet
                if monotonic() >= deadline:
                    return False
                continue
            return True

    def _drop(self, rank: int, why: str) -> None:
        self.store.set(f"dropped/{rank}", why)
        self.lost.append((rank, why))

    def _dropped(self) -> PeerError:
        self.store = None
        return PeerError(
            f"rank {self.rank} came too late and was dropped; the others go on without it. If it is only slow, raise "
            f"engine.timeout_s (now {self.timeout_s:g}); it can take part again when the run is resumed"
        )

    def _leave(self, why: str) -> None:
        """Say so in place of the next numbers. The store ends with rank 0, which first hears from all others once more."""
        if self.store is None:
            return
        from torch.distributed import DistNetworkError

        self.round += 1
        word = {"left": why}
        with suppress(DistNetworkError):  # rank 0 was sooner, or died
            if self.rank:
                self.store.set(f"{self.round}/{self.rank}", json.dumps(word))
            else:
                self.store.set(str(self.round), json.dumps({0: word}))
                deadline = monotonic() + self.timeout_s
                for rank in self.ranks[1:]:
                    self._arrives(f"{self.round}/{rank}", deadline - monotonic())
        self.store = None


class ReplicasEngine(SingleEngine):
    """A rank's copy of the model on its own device, for methods that know by scalars what all have found."""

    provides: ClassVar[frozenset[str]] = frozenset({"probes"})
    group_kind: ClassVar[type[Group]] = Star

    def __init__(self, config: Any, precision: str, needs_fp32_weights: bool = False) -> None:
        super().__init__(config, precision, needs_fp32_weights)
        self.group = Star(config.timeout_s, config.check_every)
        number = torch.accelerator.device_count() if config.device == "auto" else 0
        if number > 1:  # the ranks of a machine share its devices out
            self.device = torch.device(self.device.type, place().local_rank % number)
            torch.accelerator.set_device_index(self.device.index)


def _connect(rank: int, world: int) -> Any:
    """torch's store for this group: rank 0's own, or the one that torchrun keeps at the same address."""
    from torch.distributed import DistError, PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(  # of several tenants: where rank 0 has a process group, that has its store at this address already
            host, port, is_master=rank == 0 and not is_kept, timeout=timedelta(seconds=START_S), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except DistError as error:
        raise PeerError(
            f"engine: replicas: rank {rank} of {world} did not meet the others at {host}:{port}: {str(error).splitlines()[0]}; "
            "see that rank 0 runs, and that MASTER_ADDR and MASTER_PORT lead to a free port of its machine"
        ) from error
    if not is_kept:
        return PrefixStore("tunesmith", store)
    attempt = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    return PrefixStore(f"tunesmith/{attempt}", store)  # there lies still what an earlier attempt has left
