"""The ranks that work on one run, and the few numbers that they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Group:
    """One rank alone: what it says is all there is to know. Base of all groups."""

    rank: int = 0
    world: int = 1
    """Ranks that were started."""
    ranks: tuple[int, ...] = (0,)
    """Those that are there still, this one among them; the same on all of them."""
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

    def hand_over(self, give: Callable[[], bytes], take: Callable[[bytes], None]) -> None:
        """What rank 0 gives, taken by all others before any of them goes on."""

    def gather(self, numbers: Any) -> dict[int, Any]:
        """By rank what each of `ranks` says: numbers in lists and dicts by name. One that dies is left out, of `ranks` too."""
        return {self.rank: numbers}

    def heed(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Whether all ranks are to stop, which is so after the `gather` in which one of them wished it by its `stop`."""
        return stop

    def pop_lost(self) -> list[tuple[int, str]]:
        """(rank, why) of those that were dropped since this was last asked; rank 0 knows."""
        return []
