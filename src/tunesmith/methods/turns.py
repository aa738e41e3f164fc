"""Which chunks train at which update: a function of the update alone, so that resuming needs nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Turns:
    """The order in which chunks train."""

    num_chunks: int
    num_active: int
    """Chunks that train together."""
    order: str | tuple[int, ...]
    updates_per_chunk: int
    seed: int

    @property
    def per_cycle(self) -> int:
        """Turns until every chunk has had one."""
        return len(self.order) if isinstance(self.order, tuple) else -(-self.num_chunks // self.num_active)

    def at(self, update: int) -> tuple[int, ...]:
        """The chunks that train at an update, in ascending order."""
        turn = update // self.updates_per_chunk
        cycle, place = divmod(turn, self.per_cycle)
        if isinstance(self.order, tuple):
            return (self.order[place],)
        everyone = list(range(self.num_chunks))
        if self.order == "sampled":
            return tuple(sorted(Random(f"{self.seed} {turn}").sample(everyone, self.num_active)))
        if self.order == "random":
            Random(f"{self.seed} {cycle}").shuffle(everyone)
        elif self.order == "descending":
            everyone.reverse()
        return tuple(sorted(everyone[place * self.num_active : (place + 1) * self.num_active]))

    def seen(self, updates: int) -> set[int]:
        """The chunks that have trained in the first so many updates."""
        turns = range(0, updates, self.updates_per_chunk)
        if self.order != "sampled":
            turns = turns[: self.per_cycle]
        return {chunk for update in turns for chunk in self.at(update)}
