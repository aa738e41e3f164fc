"""What several parts of the program ask of tensors that ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor; it shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def mesh_of(x: Tensor) -> Any:
    """The ranks over which a tensor is cut; None where each holds it whole."""
    return x.device_mesh if isinstance(x, DTensor) else None


def whole(x: Tensor) -> Tensor:
    """The tensor in one piece; all ranks that hold a part of it must ask for it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def part_like(x: Tensor, like: Tensor) -> Tensor:
    """Of a tensor in one piece what belongs to this rank, cut as `like` is cut; itself where that is whole."""
    if not isinstance(like, DTensor) or isinstance(x, DTensor):
        return x
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    own = x[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    return DTensor.from_local(
        own.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )


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
