"""What ranks send each other: every collective operation while a model runs, by kind and group, with its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operation(NamedTuple):
    """How a collective's arguments tell its payload."""

    kind: str
    whole: int = 0
    """Which argument holds what is gathered, reduced or sent in one piece."""
    is_part: bool = False
    """Whether that argument is one rank's part of it."""


OPERATIONS: Mapping[str, Operation] = {
    # torch.distributed's own
    "c10d::_allgather_base_": Operation("all-gather"),
    "c10d::allgather_": Operation("all-gather"),
    "c10d::allgather_coalesced_": Operation("all-gather"),
    "c10d::allgather_into_tensor_coalesced_": Operation("all-gather"),
    "c10d::_reduce_scatter_base_": Operation("reduce-scatter", 1),
    "c10d::reduce_scatter_": Operation("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": Operation("reduce-scatter", 1),
    "c10d::allreduce_": Operation("all-reduce"),
    "c10d::allreduce_coalesced_": Operation("all-reduce"),
    "c10d::alltoall_": Operation("all-to-all", 1),
    "c10d::alltoall_base_": Operation("all-to-all", 1),
    "c10d::broadcast_": Operation("broadcast"),
    "c10d::send": Operation("send"),
    # DTensor's
    "_c10d_functional::all_gather_into_tensor": Operation("all-gather", is_part=True),
    "_c10d_functional::all_gather_into_tensor_coalesced": Operation("all-gather", is_part=True),
    "_c10d_functional::reduce_scatter_tensor": Operation("reduce-scatter"),
    "_c10d_functional::reduce_scatter_tensor_coalesced": Operation("reduce-scatter"),
    "_c10d_functional::all_reduce": Operation("all-reduce"),
    "_c10d_functional::all_reduce_": Operation("all-reduce"),
    "_c10d_functional::all_reduce_coalesced": Operation("all-reduce"),
    "_c10d_functional::all_reduce_coalesced_": Operation("all-reduce"),
    "_c10d_functional::all_to_all_single": Operation("all-to-all"),
    "_c10d_functional::broadcast": Operation("broadcast"),
}

SENT: Mapping[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "send": lambda n: 1.0,
}
"""Of the payload, what each of n ranks sends in a ring."""


class Count(NamedTuple):
    """Calls, bytes of the tensors that were gathered, reduced or sent, and bytes that this rank put on the wire."""

    calls: int = 0
    payload: float = 0
    sent: float = 0

    def plus(self, other: Count) -> Count:
        return Count(self.calls + other.calls, self.payload + other.payload, self.sent + other.sent)

    def times(self, number: int) -> Count:
        return Count(self.calls * number, self.payload * number, self.sent * number)


class Traffic(TorchDispatchMode):
    """Counts inside, backward passes included: torch takes the mode of the thread that calls `backward` into its own threads.

    names: by process group (its `group_name`) what it is called, such as a mesh's dimension; others go by torch's name.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names
        self.counts: dict[tuple[str, str], Count] = {}
        """By (kind, group)."""

    def of(self, kind: str | None = None, group: str | None = None) -> Count:
        """The sum over those of this kind and group; None: any."""
        total = Count()
        for (of_kind, of_group), count in self.counts.items():
            if kind in (None, of_kind) and group in (None, of_group):
                total = total.plus(count)
        return total

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: then what it makes of this comes by
        self.seen(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def seen(self, function: Any, args: Any, kwargs: Any) -> None:
        """Count an operation if it sends something."""
        operation = OPERATIONS.get(function._schema.name) if isinstance(function, torch._ops.OpOverload) else None
        if operation is not None:
            self._note(operation, function, args, kwargs)

    def _note(self, operation: Operation, function: Any, args: Any, kwargs: Any) -> None:
        names = [argument.name for argument in function._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        group: Any = (
            _resolve_process_group(given["group_name"])
            if "group_name" in given
            else dist.ProcessGroup.unbox(given["process_group"])
        )
        n = group.size()
        payload = sum(_bytes(given[names[operation.whole]])) * (n if operation.is_part else 1)
        key = operation.kind, self.names.get(group.group_name, group.group_name)
        count = Count(1, payload, payload * SENT[operation.kind](n))
        self.counts[key] = self.counts.get(key, Count()).plus(count)


def group_names(mesh: Any, **more: Any) -> dict[str, str]:
    """For `Traffic`: a mesh's dimensions by their groups, and other groups by name."""
    groups = {name: mesh.get_group(name) for name in mesh.mesh_dim_names} | more
    return {group.group_name: name for name, group in reversed(groups.items())}  # of two names the first


def _bytes(tensors: Any) -> Iterator[int]:
    return (x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))
