"""What several parts of the program ask of tensors that ranks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

Runs = Sequence[Sequence[tuple[int, int]]]
"""Which part of a tensor: for each dimension the stretches (start, stop) that belong to it, in order."""


def from_all(own: Any, ranks: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank says, by rank; of one that is alone its own."""
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(found, own, group=ranks)
    return found


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor; it shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def is_hollow(x: Tensor) -> bool:
    """Whether a tensor has no numbers: it has a shape alone, or is one of a run that is only foreseen."""
    return x.is_meta or isinstance(local_part(x), FakeTensor)


def mesh_of(x: Tensor) -> Any:
    """The ranks over which a tensor is cut; None where each holds it whole."""
    return x.device_mesh if isinstance(x, DTensor) else None


def whole(x: Tensor) -> Tensor:
    """The tensor in one piece; all ranks that hold a part of it must ask for it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def summed(x: Tensor, mesh: Any) -> Tensor:
    """The sum over ranks, whose gradient each of them has whole."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def sum_gradient(x: Any, mesh: Any) -> Any:
    """The same, with the gradient summed over ranks."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def own_part(tensor: Tensor) -> tuple[Tensor, Runs]:
    """(this rank's part of a tensor, which part of the whole it is); both the whole if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor, [[(0, size)] for size in tensor.shape]
    return tensor.to_local(), [_runs(tensor, dim) for dim in range(tensor.ndim)]


def _runs(tensor: Any, dim: int) -> list[tuple[int, int]]:
    """Stretches of a dimension that this rank has: torch's own sharding, applied to the numbers 0 … size-1."""
    size = tensor.shape[dim]
    placements: list[Any] = []
    for placement in tensor.placements:
        if isinstance(placement, _StridedShard) and placement.dim == dim:
            placements.append(_StridedShard(0, split_factor=placement.split_factor))
        elif isinstance(placement, Shard) and placement.dim == dim:
            placements.append(Shard(0))
        else:
            placements.append(Replicate())
    if all(isinstance(placement, Replicate) for placement in placements):
        return [(0, size)]
    numbers = torch.arange(size)
    own = distribute_tensor(numbers, tensor.device_mesh, placements, src_data_rank=None).to_local().cpu()
    if not len(own):
        return [(0, 0)]
    breaks = (own.diff() != 1).nonzero()[:, 0].tolist()
    edges = [0, *(at + 1 for at in breaks), len(own)]
    return [(int(own[start]), int(own[stop - 1]) + 1) for start, stop in pairwise(edges)]


def copy_part(x: Tensor, runs: Runs, into: Tensor) -> None:
    """Of a tensor in one piece the part that `own_part` tells of."""
    for dim, stretches in enumerate(runs):
        if list(stretches) != [(0, x.shape[dim])]:
            x = torch.cat([x.narrow(dim, start, stop - start) for start, stop in stretches], dim)
    into.copy_(x)


def room_for(x: Tensor, like: Tensor, device: str | None = None) -> Tensor:
    """What a saved tensor of this shape and type can be read into: cut and placed as `like` if it has its shape, else whole,
    on the CPU. device: where else than `like`."""
    if x.shape != like.shape:
        return torch.empty_like(x, device="cpu")
    return torch.empty_like(like, dtype=x.dtype, device=device or local_part(like).device, requires_grad=False)


def layout_of(x: Tensor) -> Any:
    """How a tensor is cut over ranks; None where it is not."""
    return x._spec if isinstance(x, DTensor) else None


def laid_out(own: Tensor, layout: Any) -> Tensor:
    """This rank's part again as one of a tensor cut so. It stays on its device, unlike under `DTensor.from_local`."""
    return own if layout is None else DTensor(own, layout, requires_grad=False)


def mapped(tree: Any, change: Callable[[tuple[Any, ...], Tensor], Any], path: tuple[Any, ...] = ()) -> Any:
    """Nested dicts and lists with each tensor changed; `change` gets the keys and indices that lead to it, too."""
    if isinstance(tree, Tensor):
        return change(path, tree)
    if isinstance(tree, dict):
        return {key: mapped(value, change, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(value, change, (*path, n)) for n, value in enumerate(tree))
    return tree


def copied(tree: Any) -> Any:
    """The same with copies of the tensors in the host's memory."""
    return mapped(tree, lambda _, x: x.detach().to("cpu", copy=True))


def bytes_here(tree: Any) -> int:
    """What the tensors take on this rank."""
    sizes: list[int] = []
    mapped(tree, lambda _, x: sizes.append(local_part(x).numel() * x.element_size()))
    return sum(sizes)
