"""Which of several processes this one is, as the launcher says in the environment."""

from __future__ import annotations

import os
from typing import NamedTuple

from tunesmith.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """A process among those of a run."""

    rank: int = 0
    world: int = 1
    """Processes in all."""
    local_rank: int = 0
    """Number among those of its machine."""


def place() -> Place:
    """This process's place; alone without a launcher. Raises UserError where the environment says half of it."""
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not {"RANK", "WORLD_SIZE"} & given.keys():
        return Place()
    if missing := [name for name in VARIABLES if name not in given]:
        raise UserError(
            f"engine: {', '.join(given)} is set, but {', '.join(missing)} is not; start with torchrun, or set all of "
            f"{', '.join(VARIABLES)}"
        )
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not given[name].isdecimal():
            raise UserError(f"engine: {name} is {given[name]!r}; set it to a number")
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= world:
        raise UserError(f"engine: RANK is {rank}, but WORLD_SIZE {world}; ranks count from 0")
    return Place(rank, world, int(os.environ.get("LOCAL_RANK", rank)))
