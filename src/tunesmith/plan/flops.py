"""Floating-point operations of what torch's own counter does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad_out: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad_out, query, key, value))


def _grouped(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """2 for each number of a row of the left and of the matrix that it meets."""
    return int(2 * a[0] * a[1] * b[-1])


FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped,
}
"""By operation: shapes of its arguments → operations. Attention is counted whole, as torch does, also where it is causal."""

OF_OPERATION: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{operation: shape_wrapper(formula) for operation, formula in FORMULAS.items()},
}
"""The same and torch's own, to be called with tensors."""
