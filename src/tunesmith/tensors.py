"""What several parts of the program ask of tensors that ranks share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor; it shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def mesh_of(x: Tensor) -> Any:
    """The ranks over which a tensor is cut; None where each holds it whole."""
    return x.device_mesh if isinstance(x, DTensor) else None


def whole(x: Tensor) -> Tensor:
    """The tensor in one piece; all ranks that hold a part of it must ask for it."""
    return x.full_tensor() if isinstance(x, DTensor) else x
