"""What several parts of the program ask of tensors that ranks share."""

from __future__ import annotations

from typing import Any

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


def as_part(x: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is cut as `like` is; itself where that is whole, or where it is no such part."""
    if not isinstance(like, DTensor) or isinstance(x, DTensor) or x.shape != like.to_local().shape:
        return x
    return DTensor.from_local(
        x, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
