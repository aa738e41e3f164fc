"""Tensors without numbers: a step runs as it would, and takes neither memory nor arithmetic.

What is computed are torch's fake tensors: they have shape, type and storage size. What says which tokens, positions and
sequences there are stays real, since the step asks it how large things are; and a mixture of experts sends its tokens to all
experts alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_map

from tunesmith.phases import watching
from tunesmith.plan.ledger import DEVICE, tensors_in
from tunesmith.tensors import laid_out, layout_of, local_part

aten = torch.ops.aten

CPU = torch.device("cpu")

Rule = Callable[..., Any]


class Shadow(TorchDispatchMode):
    """Inside, whatever comes of a hollow tensor is hollow, and so is what the model makes anew of floating-point numbers.

    In an update all that is made is hollow; beside a run's phases, where batches are made, nothing is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.is_on = False
        self.phase = ""
        self.watch = ExitStack()
        self.watchers: list[Callable[[Any, Any, Any, Any], None]] = []

    def __enter__(self) -> Self:
        self.is_on = True
        self.watch.enter_context(watching(self.during))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.is_on = False
        self.watch.close()
        super().__exit__(*error)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, the run is in this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def watched(self, watcher: Callable[[Any, Any, Any, Any], None]) -> Iterator[None]:
        """Inside, the watcher is told of every operation, its arguments and its result; that costs less than a mode."""
        self.watchers.append(watcher)
        try:
            yield
        finally:
            self.watchers.remove(watcher)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, tensors have numbers."""
        with _disable_current_modes() if self.is_on else nullcontext():
            yield

    def hollow(self, x: Tensor) -> Tensor:
        """A tensor of this shape, type and cut without numbers, on the CPU."""
        with self.off():
            part = local_part(x.detach())
            with self.fake:
                found = torch.empty_strided(part.shape, part.stride(), dtype=x.dtype, device="cpu")
            return laid_out(found, layout_of(x))

    def hollow_out(self, model: nn.Module) -> None:
        """Replace a model's weights and buffers; those that are tied stay so."""
        made: dict[int, Tensor] = {}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    if id(p) not in made:
                        made[id(p)] = nn.Parameter(self.hollow(p), requires_grad=p.requires_grad)
                    module._parameters[name] = cast(nn.Parameter, made[id(p)])
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    made[id(buffer)] = made.get(id(buffer), self.hollow(buffer))
                    module._buffers[name] = made[id(buffer)]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is DEVICE:
            return CPU
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # what it does with the tensors within comes by
        result = self._result(function, args, kwargs or {})
        for watcher in self.watchers:
            watcher(function, args, kwargs or {}, result)
        return result

    def _result(self, function: Any, args: Any, kwargs: Any) -> Any:
        tensors = list(tensors_in(args, kwargs))
        real = [x for x in tensors if not isinstance(x, FakeTensor)]
        if len(real) == len(tensors) and (tensors or not self._makes_hollow(function, args, kwargs)):
            return function(*args, **kwargs)
        if rule := RULES.get(function):
            return rule(self, function, *args, **kwargs)
        if function in PLAIN and not real and kwargs.get("device") is None:
            with in_kernel_invocation_manager(self.fake):
                found = function(*args, **kwargs)
            return found if isinstance(found, FakeTensor) else FakeTensor(self.fake, found, CPU)
        if real:
            args, kwargs = tree_map(self._faked, (args, kwargs))
        with self.fake:
            return function(*args, **kwargs)

    def _makes_hollow(self, function: Any, args: Any, kwargs: Any) -> bool:
        """Whether what an operation without tensors makes is to have no numbers."""
        return bool(self.phase) and (self.phase in NO_INDICES or _makes_numbers(function, args, kwargs))

    def _faked(self, x: Any) -> Any:
        return self.fake.from_tensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x


NO_INDICES = ("update", "host", "disk", "saving")
"""Phases in which nothing that is made says how large other things are."""


def _makes_numbers(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether what an operation without tensors makes is of floating-point numbers."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return cast(bool, dtype.is_floating_point)
    if function is aten.full.default:
        return isinstance(args[1], float)
    return function is not aten.arange.default and function not in (aten.arange.start, aten.arange.start_step)


def _grouped(
    shadow: Shadow, function: Any, a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, *more: Any
) -> Any:
    """A product for each group: rows of `a` with matrices of `b`, or over rows of both. torch's own rule wants bf16."""
    if a.ndim == 2 and b.ndim == 2:
        shape: tuple[int, ...] = (len(offs), a.shape[0], b.shape[1])
    else:
        shape = (*a.shape[:-1], b.shape[-1])
    with shadow.fake:
        return torch.empty(shape, dtype=a.dtype, device=a.device)


def _a_number(shadow: Shadow, function: Any, x: Tensor) -> Any:
    """What code that looks at a number gets to see: a finite one, and that all is well."""
    return True if x.dtype == torch.bool else 1.0 if x.dtype.is_floating_point else 1


def _alike(shadow: Shadow, function: Any, a: Tensor, b: Tensor, *more: Any) -> bool:
    return True


def _top(shadow: Shadow, function: Any, x: Tensor, k: int, dim: int = -1, *more: Any, **named: Any) -> Any:
    """The largest are taken in turn: experts get as many tokens each."""
    with shadow.fake:
        values, hollow = function(x, k, dim, *more, **named)
    size = x.shape[dim]
    indices = torch.arange(hollow.numel()).remainder_(size).view(*hollow.movedim(dim, -1).shape).movedim(-1, dim)
    return values, indices.contiguous()


def _first(shadow: Shadow, function: Any, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    with shadow.fake:
        shape = function(x, dim, keepdim).shape
    return torch.zeros(shape, dtype=torch.long)


def _places(shadow: Shadow, function: Any, x: Tensor, indices: Any, *more: Any, **named: Any) -> Any:
    """A mask's numbers say how many there are."""
    found: list[Any] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8) and not isinstance(index, FakeTensor)
        found += index.nonzero(as_tuple=True) if is_mask else [index]
    args, kwargs = tree_map(shadow._faked, ((x, found, *more), named))
    with shadow.fake:
        return function(*args, **kwargs)


RULES: dict[Any, Rule] = {
    aten.index.Tensor: _places,
    aten.index_put.default: _places,
    aten.index_put_.default: _places,
    aten._local_scalar_dense.default: _a_number,
    aten.topk.default: _top,
    aten.argmax.default: _first,
    aten.argmin.default: _first,
    aten._grouped_mm.default: _grouped,
    aten.allclose.default: _alike,
    aten.equal.default: _alike,
}
"""Operations whose results decide how large other things are."""

PLAIN = {
    aten.detach.default, aten.view.default, aten.view.dtype, aten._unsafe_view.default, aten.t.default, aten.transpose.int,
    aten.slice.Tensor, aten.unsqueeze.default, aten.expand.default, aten.select.int, aten.as_strided.default,
    aten._to_copy.default, aten.copy_.default, aten.mm.default, aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor,
    aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.mean.dim, aten.sum.dim_IntList, aten.silu.default,
    aten.gather.default, aten.scatter_add.default, aten._log_softmax.default, aten._log_softmax_backward_data.default,
}  # fmt: skip
"""Operations of one result, whose own rules for tensors without numbers are asked directly: that costs a third."""
