"""The ranks that work on one run, and the few numbers that they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from tunesmith.errors import UserError


class Group:
    """One rank alone: what it says is all there is to know. Base of all groups."""

    rank: int = 0
    world: int = 1
    """Ranks that were started."""
    ranks: tuple[int, ...] = (0,)
    """Those that are there still, this one among them; the same on all of them."""
    reads_checkpoints: ClassVar[bool] = False
    """Whether each rank saves and reads its own part of a checkpoint. Else rank 0 does it, and hands over what it has read."""
    check_every: int = 0
    """Steps between two comparisons of what the ranks hold; 0: there is nothing to compare."""

    @classmethod
    def rank_here(cls) -> int:
        """Rank of this process, known before the group is."""
        return 0

    @contextmanager
    def joined(self, facts: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the ranks work together. Raises UserError where the ranks' facts differ, each a number or text by name."""
        yield

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Of the ranks of a machine one does what is inside before the others, who find in the cache what it has made."""
        yield

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Inside, an exchange that fails names the ranks that did not come. Raises PeerError."""
        yield

    def check_shared(self, folder: Path) -> None:
        """Raises UserError where ranks must share a folder, and some do not see what rank 0 writes there."""

    def at(self, step: int, doing: str) -> None:
        """Let the others know how far this rank has come, so that those who wait for it in vain can tell."""

    def hand_over(self, give: Callable[[], bytes], take: Callable[[bytes], None]) -> None:
        """What rank 0 gives, taken by all others before any of them goes on."""

    def meet(self) -> None:
        """Wait for ranks that take longer over what is done once than they may for a step."""

    def gather(self, numbers: Any) -> dict[int, Any]:
        """By rank what each of `ranks` says: numbers in lists and dicts by name. One that dies is left out, of `ranks` too."""
        return {self.rank: numbers}

    def agree(self, number: int) -> int:
        """The greatest of what the ranks say, where all of them must do the same."""
        return number

    def heed(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Whether all ranks are to stop, which is so after the `gather` in which one of them wished it by its `stop`."""
        return stop

    def pop_lost(self) -> list[tuple[int, str]]:
        """(rank, why) of those that were dropped since this was last asked; rank 0 knows."""
        return []


def check_alike(facts: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises UserError, on all ranks the same, where some were started with something else than rank 0."""
    first = facts[0]
    names = dict.fromkeys(name for answer in facts.values() for name in answer)
    lines = [
        f"rank {rank}: {name} is {answer.get(name)}, on rank 0 {first.get(name)}"
        for rank, answer in facts.items()
        for name in names
        if answer.get(name) != first.get(name)
    ]
    if lines:
        raise UserError(
            "the ranks were not started alike:\n  "
            + "\n  ".join(lines)
            + "\nstart all of them with the same configuration, "
            "data and versions"
        )
