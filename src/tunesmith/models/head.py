"""From hidden states to numbers about tokens, without ever holding a [tokens, vocabulary] tensor.

Hidden states that predict a target go through the head a chunk at a time. Where ranks share out the vocabulary, each has the
logits of its own tokens, and log-probabilities are made of sums over ranks.
Shapes: N targets, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from tunesmith.models.slices import Slice, slice_of, tap_linear
from tunesmith.tensors import local_part, mesh_of, sum_gradient, summed
from tunesmith.types import Wanted

CHUNK_ELEMENTS = 2**23
"""Logits held at once. 2^23 fp32 logits are 32 MiB: large enough for the matrix product to run at full speed."""

TRAINED_CHUNK_ELEMENTS = 2**26
"""The same under a trained head, where each chunk also adds to a [V, D] gradient: at most as many rows as make the chunk
as large as that gradient, and at most 256 MiB."""


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: cap · tanh(scale · (W h + b) / cap), with cap None for no cap.

    `linear` is the model's own output layer, or None when its logits follow no such rule; then the model's own
    forward gives them, and [tokens, vocabulary] is held for the targets of one micro-batch.
    """

    linear: nn.Module | None
    scale: float = 1.0
    cap: float | None = None

    def transform(self, logits: Tensor) -> Tensor:
        """Logits from the linear layer's output, in at least fp32."""
        logits = at_least_fp32(logits)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] from hidden states, all at once."""
        linear: Any = self.linear
        return self.transform(linear(hidden_ND.to(linear.weight.dtype)))


@dataclass(frozen=True)
class Targets:
    """The tokens that are scored, and what the objective wants to know about them."""

    token_N: Tensor
    wanted: Wanted = field(default_factory=Wanted)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """The batch's token columns at the targets, [N, …]."""
    weight_N: Tensor | None = None
    """The batch's loss weights at the targets."""

    def part(self, rows: slice) -> Targets:
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Targets(self.token_N[rows], self.wanted, columns)

    @property
    def num_others(self) -> int:
        """How many numbers without gradient there are for each target."""
        return len(self.wanted.observed) + (self.wanted.token_loss is not None)

    def among(self) -> Targets:
        """The same where the vocabulary is no more than the tokens that are asked for, each target's own K."""
        assert self.wanted.among is not None
        choice_NK = self.columns[self.wanted.among]
        local_NK = torch.arange(choice_NK.shape[1], device=choice_NK.device).where(choice_NK >= 0, -1)
        token_N = (choice_NK == self.token_N[:, None]).long().argmax(-1)
        return Targets(token_N, self.wanted, {**self.columns, self.wanted.among: local_NK})

    def of_logits(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """([N] that carries the gradient: the token loss if there is one, else the log-probability; [others, N] without).

        Of logits whose columns ranks share out, every rank is told the same.
        """
        if isinstance(logits_NV, DTensor):
            if not self.wanted.reads_logits:
                return self._of_parts(logits_NV)
            logits_NV = logits_NV.full_tensor()
        with torch.set_grad_enabled(self.wanted.token_loss is None and torch.is_grad_enabled()):
            logprobs_NV = logits_NV.log_softmax(-1)
            logprob_N = logprobs_NV.gather(-1, self.token_N[:, None])[:, 0]
        main_N, others = logprob_N, []
        if self.wanted.token_loss is not None:
            main_N = self.wanted.token_loss(logits_NV, self.token_N, self.columns)
            others.append(logprob_N)
        with torch.no_grad():
            others += [term(logprobs_NV, self.token_N, self.columns) for term in self.wanted.observed.values()]
        return main_N, torch.stack(others) if others else logprob_N.new_zeros(0, len(logprob_N))

    def _of_parts(self, logits_NV: DTensor) -> tuple[Tensor, Tensor]:
        """The same where each rank has some columns, and all numbers are sums over them (Shoeybi et al. 2019, section 3)."""
        mesh, own_NV = logits_NV.device_mesh, logits_NV.to_local()
        highest_N = own_NV.detach().amax(-1)
        dist.all_reduce(highest_N, dist.ReduceOp.MAX, group=mesh.get_group())
        own_NV = own_NV - highest_N[:, None]
        place_N, is_here_N = _places(self.token_N, mesh, own_NV.shape[1])
        logit_N = own_NV.gather(-1, place_N[:, None])[:, 0].where(is_here_N, 0.0)
        logit_N, total_N = summed(torch.stack([logit_N, own_NV.exp().sum(-1)]), mesh)
        others = own_NV.new_zeros(0, len(logit_N))
        if self.wanted.observed:
            with torch.no_grad():
                logprobs_NV = own_NV - total_N.log()[:, None]
                terms = [term(logprobs_NV, self.token_N, self.columns) for term in self.wanted.observed.values()]
                others = summed(torch.stack(terms), mesh)
        return logit_N - total_N.log(), others


def score_targets(hidden_ND: Tensor, head: Head, targets: Targets) -> tuple[Tensor, Tensor]:
    """What `Targets.of_logits` says, from hidden states and in chunks; at least fp32."""
    linear: Any = head.linear
    if targets.wanted.among and type(linear) is nn.Linear and not torch.is_grad_enabled():
        return targets.among().of_logits(_logits_among(hidden_ND, head, targets.columns[targets.wanted.among]))
    mesh = mesh_of(linear.weight)  # of the ranks that share the vocabulary out
    vocabulary, width = local_part(linear.weight.detach()).shape
    trained = slice_of(linear.weight) or (Slice(linear.weight, 0, vocabulary) if linear.weight.requires_grad else None)
    at_once = linear.weight.shape[0] if targets.wanted.reads_logits else vocabulary
    rows = rows_at_once(at_once, 0 if trained is None else (trained.stop - trained.start) * width)
    if type(linear) is nn.Linear:
        dtype = _compute_dtype(linear.weight)
        weight, bias = (None if x is None else local_part(x.to(dtype)) for x in (linear.weight, linear.bias))
        if mesh is not None:
            hidden_ND = sum_gradient(hidden_ND, mesh)
        part = slice_of(linear.weight)
        leaf = None if part is None else part.leaf.to(dtype)
        where = None if part is None else (part.start, part.stop)
        return _ChunkedHead.apply(
            hidden_ND, weight, bias, leaf, targets, head, rows, (where, mesh), torch.is_grad_enabled()
        )

    # an output layer that a method has wrapped (an adapter, a trained copy): the same chunks, through the module itself
    def of_chunk(hidden: Tensor, part: Targets) -> tuple[Tensor, Tensor]:
        return part.of_logits(head.transform(linear(hidden)))

    parts = _chunks(len(hidden_ND), rows) or [slice(0, 0)]  # without targets too, each weight gets its gradient: 0
    chunks = [checkpoint(of_chunk, hidden_ND[part], targets.part(part), use_reentrant=False) for part in parts]
    return torch.cat([main for main, _ in chunks]), torch.cat([other for _, other in chunks], dim=1)


def rows_at_once(vocabulary: int, trained: int) -> int:
    """Hidden states of a chunk, where so many numbers of the output layer train."""
    return max(1, CHUNK_ELEMENTS // vocabulary, min(trained, TRAINED_CHUNK_ELEMENTS) // vocabulary)


def _logits_among(hidden_ND: Tensor, head: Head, choice_NK: Tensor) -> Tensor:
    """Logits of each target's own tokens alone, [N, K]; -inf where there is none."""
    linear: Any = head.linear
    token_U, place_NK = choice_NK.clamp(min=0).unique(return_inverse=True)
    weight_UD = _rows_of(linear.weight, token_U)
    bias_U = None if linear.bias is None else _rows_of(linear.bias, token_U)
    logits_NU = nn.functional.linear(hidden_ND.to(linear.weight.dtype), weight_UD, bias_U)
    return head.transform(logits_NU.gather(1, place_NK)).masked_fill(choice_NK < 0, -torch.inf)


def _rows_of(x: Tensor, number_U: Tensor) -> Tensor:
    """Rows of a tensor, also where ranks share them out."""
    if not isinstance(x, DTensor):
        return x[number_U]
    own = x.to_local()
    place_U, is_here_U = _places(number_U, x.device_mesh, len(own))
    found = own[place_U]
    found[~is_here_U] = 0
    return summed(found, x.device_mesh)


def _places(number_N: Tensor, mesh: Any, size: int) -> tuple[Tensor, Tensor]:
    """(place among this rank's `size` numbers, or any; whether it is one of them)."""
    place_N = number_N - mesh.get_local_rank() * size
    return place_N.clamp(0, size - 1), (place_N >= 0) & (place_N < size)


@dataclass(frozen=True)
class _Weights:
    """The output layer's, in the dtype of its product; `leaf`: the rows where[0] … where[1]-1 that alone train, or None.

    mesh: ranks that share out the layer's rows, of which these are one's; or None.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    leaf: Tensor | None
    where: tuple[int, int] | None
    mesh: Any

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.weight_VD, self.bias_V, self.leaf

    def logits(self, hidden_ND: Tensor, head: Head) -> Tensor:
        hidden_ND = hidden_ND.to(self.weight_VD.dtype)
        raw_NV = nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        if self.leaf is not None and self.where is not None:
            raw_NV = tap_linear(raw_NV, hidden_ND, Slice(self.leaf, *self.where))  # type: ignore[arg-type]
        logits_NV = head.transform(raw_NV)
        return logits_NV if self.mesh is None else DTensor.from_local(logits_NV, self.mesh, [Shard(1)], run_check=False)


class _ChunkedHead(torch.autograd.Function):
    """A linear layer and what comes after it, chunked; the gradient of one number for each row.

    Gradients are taken in the forward pass, while a chunk's logits exist, so that no product with the vocabulary is done
    twice. That is exact for the hidden states: a token's number depends on its own alone, and the backward pass only
    scales. A trained head's gradient is a sum over tokens, so it needs their weights in the loss beforehand. For a
    likelihood they are a multiple of the batch's weights, and taken for that; for other losses (and should the guess be
    wrong) the backward pass makes the chunks again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, leaf: Tensor | None, targets: Targets,
        head: Head, rows: int, where: tuple[tuple[int, int] | None, Any], with_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.targets, ctx.head, ctx.rows, ctx.where = targets, head, rows, where
        weights = _Weights(weight_VD, bias_V, leaf, *where)
        ctx.wanted = [with_grad and x is not None and x.requires_grad for x in (hidden_ND, *weights.tensors())]
        ctx.trained = any(ctx.wanted[1:])
        number, dtype = len(targets.token_N), at_least_fp32(hidden_ND[:0]).dtype
        out = (
            torch.empty(number, dtype=dtype, device=hidden_ND.device),
            torch.empty(targets.num_others, number, dtype=dtype, device=hidden_ND.device),
        )
        if ctx.trained and targets.wanted.is_likelihood:
            guess_N = torch.ones_like(out[0]) if targets.weight_N is None else targets.weight_N.to(dtype)
            grads = _gradients(hidden_ND, weights, ctx.wanted, targets, guess_N, head, rows, out)
            ctx.save_for_backward(hidden_ND, *weights.tensors(), guess_N, *grads)
        else:
            grad_now = ctx.wanted[0] and not ctx.trained
            grad_ND = torch.empty_like(hidden_ND) if grad_now else None
            for part in _chunks(number, rows):
                hidden = hidden_ND[part].detach().requires_grad_(grad_now)
                with torch.set_grad_enabled(grad_now):
                    main = _fill(out, part, hidden, weights, targets, head)
                if grad_ND is not None:
                    (grad_ND[part],) = torch.autograd.grad(main, hidden, torch.ones_like(main))
            if ctx.trained:
                ctx.save_for_backward(hidden_ND, *weights.tensors(), None)
            else:
                ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(out[1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _others: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trained:
            (grad_ND,) = ctx.saved_tensors
            return (grad_ND * grad_N[:, None].to(grad_ND.dtype), *[None] * 8)
        hidden_ND, weight_VD, bias_V, leaf, guess_N, *grads = ctx.saved_tensors
        weights = _Weights(weight_VD, bias_V, leaf, *ctx.where)
        grads = _scaled(grads, guess_N, grad_N) or _gradients(
            hidden_ND, weights, ctx.wanted, ctx.targets, grad_N, ctx.head, ctx.rows
        )
        found = iter(grads)
        tensors = (hidden_ND, *weights.tensors())
        done = [
            next(found).to(like.dtype) if wanted else None for wanted, like in zip(ctx.wanted, tensors, strict=True)
        ]
        return (*done, *[None] * 5)


def _scaled(grads: list[Tensor], guess_N: Tensor | None, grad_N: Tensor) -> list[Tensor] | None:
    """Gradients taken for the guess, for the true weights of the rows; None if those are no multiple of it."""
    if guess_N is None:
        return None
    factor = (grad_N * guess_N).sum() / (guess_N * guess_N).sum().clamp(min=1e-30)
    if not torch.allclose(grad_N, factor * guess_N, rtol=1e-5, atol=0.0):
        return None
    return [grad.mul_(factor) for grad in grads]


def _gradients(
    hidden_ND: Tensor, weights: _Weights, wanted: list[bool], targets: Targets, upstream_N: Tensor, head: Head,
    rows: int, out: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of (main · upstream) by those of hidden states, weight, bias and leaf that are wanted, made chunk by chunk;
    those of the layer are summed in fp32. Fills `out` on the way if it is given.
    """
    of_hidden, *of_layer = wanted
    weight, bias, leaf = (
        None if x is None else x.detach().requires_grad_(own)
        for x, own in zip(weights.tensors(), of_layer, strict=True)
    )
    assert weight is not None, "only bias and leaf may be missing"
    local = _Weights(weight, bias, leaf, weights.where, weights.mesh)
    trained = [x for x in local.tensors() if x is not None and x.requires_grad]
    grad_ND = torch.empty_like(hidden_ND) if of_hidden else None
    sums: list[Tensor] = []
    for part in _chunks(len(upstream_N), rows):
        hidden = hidden_ND[part].detach().requires_grad_(of_hidden)
        with torch.enable_grad():
            main = _fill(out, part, hidden, local, targets, head)
        grads = list(torch.autograd.grad(main, [*([hidden] if of_hidden else []), *trained], upstream_N[part]))
        if grad_ND is not None:
            grad_ND[part] = grads.pop(0)
        if sums:
            torch._foreach_add_(sums, [at_least_fp32(grad) for grad in grads])
        else:
            sums = [at_least_fp32(grad) for grad in grads]
    return [*([] if grad_ND is None else [grad_ND]), *(sums or [torch.zeros_like(p) for p in trained])]


def _fill(
    out: tuple[Tensor, Tensor] | None, part: slice, hidden: Tensor, weights: _Weights, targets: Targets, head: Head
) -> Tensor:
    """One chunk's main numbers, with their graph; their values go into `out`, and those of the others."""
    main, others = targets.part(part).of_logits(weights.logits(hidden, head))
    if out is not None:
        out[0][part], out[1][:, part] = main.detach(), others
    return main


def _chunks(total: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


def at_least_fp32(x: Tensor) -> Tensor:
    """The same in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def _compute_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
