"""Rows of a weight that train while the rest of it stands still, on unmodified models.

The rows are a leaf of their own that shares the weight's memory. Where the model uses the weight, the same operation runs,
and a tap behind it computes the rows' gradient alone in the backward pass: the gradient of the whole weight never exists.
Shapes: n rows of the slice, I inputs, O outputs, E experts, M tokens in any arrangement.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from tunesmith.models.load import blocks


@dataclass(frozen=True)
class Slice:
    """Rows start … stop-1 of a frozen weight that train."""

    leaf: nn.Parameter
    """The rows; a view of the weight's memory."""
    start: int
    stop: int


def slice_of(weight: Tensor) -> Slice | None:
    """The part of a weight that trains; None where it trains whole, or not at all."""
    return getattr(weight, "trained_slice", None)


def host_modules(model: Any, weight: nn.Parameter) -> list[nn.Module]:
    """The modules inside whose forward a weight is used; empty if its gradient cannot be tapped.

    That is the module that owns it, and in a transformer block the block's child around that: some children use their
    children's weights directly. Not the block itself, whose hooks do not run again when it is computed again
    (activation checkpointing).
    """
    block_names = [name for name, _ in blocks(model)]
    hosts: list[nn.Module] = []
    for name, module in model.named_modules():
        if not any(own is weight for own in module._parameters.values()):
            continue
        block = next((b for b in block_names if name == b or name.startswith(b + ".")), None)
        if name == block:
            return []
        if block is not None:
            name = f"{block}.{name[len(block) + 1 :].partition('.')[0]}"
        hosts.append(model.get_submodule(name))
    return hosts


def train_rows(model: Any, weight: nn.Parameter, start: int, stop: int) -> tuple[nn.Parameter, Callable[[], None]]:
    """Let rows start … stop-1 of a frozen weight train: (the leaf that collects their gradient, undo)."""
    leaf = nn.Parameter(weight.detach()[start:stop])
    part = Slice(leaf, start, stop)
    weight.trained_slice = part  # type: ignore[attr-defined]
    handles: list[RemovableHandle] = []
    watched: list[_Uses] = []
    for host in host_modules(model, weight):
        watched.append(uses := _Uses(weight, part))
        handles.append(host.register_forward_pre_hook(lambda *_, uses=uses: uses.enter()))
        handles.append(host.register_forward_hook(lambda *_, uses=uses: uses.leave(), always_call=True))

    def undo() -> None:
        del weight.trained_slice  # type: ignore[attr-defined]
        for handle in handles:
            handle.remove()
        for uses in watched:
            uses.end()

    return leaf, undo


def tap_linear(output: Tensor, x: Tensor, part: Slice) -> Tensor:
    """The output [M, O] of a linear layer (weight [O, I]) on x [M, I], with the gradient of a slice of its weight."""
    return _LinearTap.apply(output, x, part.leaf, part)


def _same(ctx: Any, output: Tensor) -> Tensor:
    """The output itself with a new place in the graph: a view could not be changed in place by what comes after."""
    ctx.mark_dirty(output)
    return output


class _LinearTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, leaf: Tensor, part: Slice) -> Tensor:
        ctx.part = part
        ctx.save_for_backward(x)
        return _same(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), part = ctx.saved_tensors, ctx.part
        own = grad[..., part.start : part.stop].reshape(-1, part.stop - part.start)
        found = own.T @ x.to(grad.dtype).reshape(-1, x.shape[-1])
        return grad, None, found.to(part.leaf.dtype), None


class _TransposedTap(torch.autograd.Function):
    """As `_LinearTap` for a weight [I, O], whose rows are inputs (GPT-2's Conv1D): only their part of x is kept."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, leaf: Tensor, part: Slice) -> Tensor:
        ctx.part = part
        ctx.save_for_backward(x[..., part.start : part.stop].contiguous())
        return _same(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), part = ctx.saved_tensors, ctx.part
        found = x.to(grad.dtype).reshape(-1, x.shape[-1]).T @ grad.reshape(-1, grad.shape[-1])
        return grad, None, found.to(part.leaf.dtype), None


class _LookupTap(torch.autograd.Function):
    """Rows looked up by number (embeddings, experts chosen per token); those outside the slice fall into a row of waste."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, index: Tensor, leaf: Tensor, part: Slice, padding: int | None) -> Tensor:
        ctx.part, ctx.padding = part, padding
        ctx.save_for_backward(index)
        return _same(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,), part = ctx.saved_tensors, ctx.part
        if not index.numel():
            return grad, None, torch.zeros_like(part.leaf), None, None
        n = part.stop - part.start
        outside = (index < part.start) | (index >= part.stop)
        if ctx.padding is not None:
            outside |= index == ctx.padding
        place = torch.where(outside, n, index - part.start)
        rows = grad.reshape(*index.shape, -1)
        found = torch.ops.aten.embedding_dense_backward(rows, place, n + 1, n, False)[:n]
        return grad, None, found.reshape(part.leaf.shape).to(part.leaf.dtype), None, None


class _GroupedTap(torch.autograd.Function):
    """Tokens sorted by expert, each multiplied with its expert's matrix; `ends` [E] says where each expert's tokens end."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, ends: Tensor, leaf: Tensor, part: Slice, transposed: bool
    ) -> Tensor:
        ctx.part, ctx.transposed = part, transposed
        first = int(ends[part.start - 1]) if part.start else 0
        ctx.ends = [end - first for end in ends[part.start : part.stop].tolist()]
        ctx.rows = slice(first, first + ctx.ends[-1])
        ctx.save_for_backward(x[ctx.rows])
        return _same(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), part = ctx.saved_tensors, ctx.part
        own, x = grad[ctx.rows], x.to(grad.dtype)
        found = torch.empty(part.leaf.shape, dtype=grad.dtype, device=grad.device)
        start = 0
        for expert, end in enumerate(ctx.ends):
            left, right = (own, x) if ctx.transposed else (x, own)
            torch.mm(left[start:end].T, right[start:end], out=found[expert])
            start = end
        return grad, None, None, found.to(part.leaf.dtype), None, None


class _Widen(torch.autograd.Function):
    """The whole weight as a function of its slice, for uses without a tap of their own: its gradient is had whole, and cut."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, weight: Tensor, part: Slice) -> Tensor:
        ctx.part = part
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[ctx.part.start : ctx.part.stop], None, None


@dataclass
class _Uses:
    """Watches a module's forward for uses of one weight, and puts taps behind them."""

    weight: nn.Parameter
    part: Slice
    _modes: list[_Watch] = field(default_factory=list)

    def enter(self) -> None:
        self._modes.append(_Watch(self.weight, self.part))
        self._modes[-1].__enter__()

    def leave(self) -> None:
        self._modes.pop().__exit__(None, None, None)

    def end(self) -> None:
        """Leave what Ctrl-C has left entered: torch runs no hooks then."""
        while self._modes:
            self.leave()


class _Watch(TorchFunctionMode):
    def __init__(self, weight: nn.Parameter, part: Slice) -> None:
        super().__init__()
        self.weight, self.part = weight, part
        self.transposed: Tensor | None = None
        """The view that grouped products are given."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        uses = sum(self._is_ours(x) for x in tree_leaves((args, kwargs)))
        if not uses or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if function is torch.Tensor.transpose and args[0] is self.weight and args[1:] == (-2, -1):
            self.transposed = function(*args)
            return self.transposed
        tap = TAPS.get(function) if uses == 1 else None
        if tap is not None and (tapped := tap(self, *args, **kwargs)) is not None:
            return tapped
        whole = _Widen.apply(self.part.leaf, self.weight, self.part)
        args, kwargs = tree_map(lambda x: self._instead(x, whole), (args, kwargs))
        result = function(*args, **kwargs)
        if any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(result)):
            warnings.warn(
                f"chunk: a weight {tuple(self.weight.shape)} is used by {getattr(function, '__name__', function)}, for which "
                "there is no gradient of a part: it is computed whole and cut, which costs the memory of one such weight",
                stacklevel=2,
            )
        return result

    def _is_ours(self, x: Any) -> bool:
        return x is self.weight or (x is self.transposed and x is not None)

    def _instead(self, x: Any, whole: Tensor) -> Any:
        if x is self.weight:
            return whole
        return whole.transpose(-2, -1) if self._is_ours(x) else x

    # arguments are named as torch names them: models may pass them by name

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if weight is not self.weight or weight.ndim != 2:
            return None
        return tap_linear(nn.functional.linear(input, weight, bias), input, self.part)

    def addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor | None:
        if mat2 is not self.weight or scales:
            return None
        return _TransposedTap.apply(torch.addmm(input, mat1, mat2), mat1, self.part.leaf, self.part)

    def embedding(self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **more: Any) -> Any:
        if weight is not self.weight or rest or any(value for name, value in more.items() if name != "norm_type"):
            return None
        if padding_idx is not None and padding_idx < 0:
            padding_idx += len(weight)
        output = nn.functional.embedding(input, weight, padding_idx)
        return _LookupTap.apply(output, input, self.part.leaf, self.part, padding_idx)

    def lookup(self, weight: Tensor, index: Any) -> Tensor | None:
        if weight is not self.weight:
            return None
        is_number = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)
        if (isinstance(index, int) and not isinstance(index, bool)) or (is_number and index.ndim == 0):
            row, part = int(index), self.part
            row += len(weight) if row < 0 else 0
            return part.leaf[row - part.start] if part.start <= row < part.stop else weight[row]
        if is_number:
            rows = torch.where(index < 0, index + len(weight), index)
            return _LookupTap.apply(weight[rows], rows, self.part.leaf, self.part, None)
        return None

    def grouped(
        self, input: Tensor, mat2: Tensor, offs: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor | None:
        if offs is None or input.ndim != 2 or any(value is not None for value in (*rest, *more.values())):
            return None
        output = torch._grouped_mm(input, mat2, offs=offs)
        return _GroupedTap.apply(output, input, offs, self.part.leaf, self.part, mat2 is not self.weight)


TAPS: dict[Any, Callable[..., Tensor | None]] = {
    nn.functional.linear: _Watch.linear,
    nn.functional.embedding: _Watch.embedding,
    torch.addmm: _Watch.addmm,
    torch.Tensor.__getitem__: _Watch.lookup,
    torch._grouped_mm: _Watch.grouped,  # what nn.functional.grouped_mm calls, which modes do not see
}
"""What models do with weights, and how a part's gradient is had there; a tap that returns None does not know this use."""
