"""What ranks hold of sharded weights while they compute: gathered ones, and gradients on their way to other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from torch.distributed.tensor._sharding_prop import ShardingPropagator

from tunesmith.plan.ledger import Ledger
from tunesmith.plan.shadow import Shadow

GATHERED, OF_GATHERED = "gathered weights", "gradients of gathered weights"

NAMED = {
    "fsdp::all_gather_copy_in": (GATHERED, (1,)),
    "fsdp::split_with_sizes_copy": (GATHERED, ("out",)),
    "fsdp::chunk_cat": (OF_GATHERED, (0, "out")),
}
"""FSDP's own operations: what those of their arguments are for."""


class RankLedger(Ledger):
    """Sees into tensors that are cut over ranks."""

    def __init__(self, shadow: Shadow | None = None) -> None:
        super().__init__()
        self.shadow = shadow
        """What computes and tells this of it; None: operations are seen as those of a real run."""
        self.pause = _Pause()
        self.open = ExitStack()

    def __enter__(self) -> Self:
        self.open.enter_context(self.pause.while_propagating())
        if self.shadow is None:
            super().__enter__()
        else:
            self.open.enter_context(self.shadow.watched(self.seen))
        return self

    def __exit__(self, *error: Any) -> None:
        if self.shadow is None:
            super().__exit__(*error)
        self.open.close()

    def seen(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self.pause.depth:
            return
        super().seen(function, args, kwargs, result)
        if (named := NAMED.get(function._schema.name)) is not None:
            kind, places = named
            self.name([kwargs[at] if isinstance(at, str) else args[at] for at in places], kind)


class _Pause:
    """On while torch finds out how a result is cut, by an operation on tensors without numbers, once for each kind of it."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1

    @contextmanager
    def while_propagating(self) -> Iterator[None]:
        kind: Any = ShardingPropagator
        lock = kind._fake_mode_lock  # torch enters it for this alone
        kind._fake_mode_lock = self
        try:
            yield
        finally:
            kind._fake_mode_lock = lock
