"""Log-probabilities of target tokens, without ever holding a [tokens, vocabulary] tensor.

The decoder runs once; of its hidden states only those that predict a target go on to the head, a chunk at a time.
Shapes: B rows, T tokens, N targets of the batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tunesmith.models.media import hidden_before_head, media_inputs
from tunesmith.types import Batch, Scores

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
        """Logits from the linear layer's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def score(model: nn.Module, head: Head, batch: Batch) -> Scores:
    """Score a batch. `logprobs_BT` is 0 where the batch's weight is 0: nothing is computed there."""
    inputs: dict[str, Any] = {"input_ids": batch.tokens_BT, "use_cache": False}
    if not _one_a_row(batch):
        # from positions that restart, transformers makes the mask that keeps packed sequences apart
        inputs["position_ids"] = batch.positions_BT
    target_BT = batch.weights_BT[:, 1:] != 0
    token_N = batch.tokens_BT[:, 1:][target_BT]
    if any(batch.media_N):
        inputs |= media_inputs(batch, model.dtype)  # type: ignore[arg-type]
        if head.linear is None:
            logits = model(**inputs).logits[:, :-1][target_BT]
            logprob_N = _at_least_fp32(logits).log_softmax(-1).gather(-1, token_N[:, None])[:, 0]
        else:
            hidden_ND = hidden_before_head(model, head.linear, inputs)[:, :-1][target_BT]
            logprob_N = token_logprobs(hidden_ND, token_N, head, batch.weights_BT[:, 1:][target_BT])
    elif head.linear is None:
        logprob_N = _from_model_logits(model, inputs, target_BT, token_N)
    else:
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        hidden_ND = decoder(**inputs)[0][:, :-1][target_BT]
        logprob_N = token_logprobs(hidden_ND, token_N, head, batch.weights_BT[:, 1:][target_BT])
    logprobs_BT = torch.zeros(batch.tokens_BT.shape, dtype=logprob_N.dtype, device=logprob_N.device)
    logprobs_BT[:, 1:] = logprobs_BT[:, 1:].masked_scatter(target_BT, logprob_N)
    return Scores(logprobs_BT)


def token_logprobs(hidden_ND: Tensor, token_N: Tensor, head: Head, weight_N: Tensor | None = None) -> Tensor:
    """log p(token | hidden) for each row, [N], in at least fp32, chunked over rows.

    `weight_N`: how the loss is likely to weigh the rows. A right guess saves work under a trained head; a wrong one
    costs nothing but that.
    """
    linear: Any = head.linear
    vocabulary, width = linear.weight.shape
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    if linear.weight.requires_grad:
        rows = max(rows, min(width, TRAINED_CHUNK_ELEMENTS // vocabulary))
    if type(linear) is nn.Linear:
        dtype = _compute_dtype(linear.weight)
        weight, bias = linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)
        guess_N = torch.ones(token_N.shape, device=token_N.device) if weight_N is None else weight_N
        return _LinearLogprobs.apply(hidden_ND, weight, bias, token_N, guess_N, head, rows, torch.is_grad_enabled())

    # an output layer that a method has wrapped (an adapter, a trained copy): the same chunks, through the module itself
    def of_chunk(hidden: Tensor, token: Tensor) -> Tensor:
        return _gather_logprobs(linear(hidden), token, head)

    chunks = zip(hidden_ND.split(rows), token_N.split(rows), strict=True)
    return torch.cat([checkpoint(of_chunk, hidden, token, use_reentrant=False) for hidden, token in chunks])


class _LinearLogprobs(torch.autograd.Function):
    """Chunked linear cross-entropy, per token and without the sign.

    The gradients are taken in the forward pass, while a chunk's logits exist, so that no product with the vocabulary is
    done twice. That is exact for the hidden states: a token's log-probability depends on its own alone, and the backward
    pass only scales. The head's gradient is a sum over tokens, so it needs their weights in the loss beforehand: it is
    taken for the guess, and used if the true weights turn out to be a multiple of it (as in every likelihood); if not,
    the backward pass makes the chunks again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, token_N: Tensor,
        guess_N: Tensor, head: Head, rows: int, with_grad: bool,
    ) -> Tensor:  # fmt: skip
        trained = with_grad and any(p is not None and p.requires_grad for p in (weight_VD, bias_V))
        ctx.head, ctx.rows, ctx.trained = head, rows, trained
        logprob_N = torch.empty(token_N.shape, dtype=_at_least_fp32(hidden_ND[:0]).dtype, device=hidden_ND.device)
        if trained:
            upstream_N = guess_N.to(logprob_N.dtype)
            grads = _gradients(hidden_ND, weight_VD, bias_V, token_N, upstream_N, head, rows, logprob_N)
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_N, upstream_N, *grads)
            return logprob_N
        grad_now = with_grad and hidden_ND.requires_grad
        grad_ND = torch.empty_like(hidden_ND) if grad_now else None
        for part in _chunks(len(token_N), rows):
            hidden = hidden_ND[part].detach().requires_grad_(grad_now)
            with torch.set_grad_enabled(grad_now):
                logprob = _chunk_logprobs(hidden, weight_VD, bias_V, token_N[part], head)
            logprob_N[part] = logprob.detach()
            if grad_ND is not None:
                (grad_ND[part],) = torch.autograd.grad(logprob, hidden, torch.ones_like(logprob))
        ctx.save_for_backward(grad_ND)
        return logprob_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trained:
            (grad_ND,) = ctx.saved_tensors
            return (grad_ND * grad_N[:, None].to(grad_ND.dtype), *[None] * 7)
        hidden_ND, weight_VD, bias_V, token_N, guess_N, *grads = ctx.saved_tensors
        factor = (grad_N * guess_N).sum() / (guess_N * guess_N).sum().clamp(min=1e-30)
        if torch.allclose(grad_N, factor * guess_N, rtol=1e-5, atol=0.0):
            grads = [grad.mul_(factor) for grad in grads]
        else:
            grads = _gradients(hidden_ND, weight_VD, bias_V, token_N, grad_N, ctx.head, ctx.rows)
        done = [grad.to(like.dtype) for grad, like in zip(grads, (hidden_ND, weight_VD, weight_VD), strict=False)]
        return (*done, *[None] * (8 - len(done)))


def _gradients(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, token_N: Tensor, upstream_N: Tensor,
    head: Head, rows: int, logprob_N: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of (logprob · upstream) by hidden states, weight and bias, made chunk by chunk and summed in fp32.

    Fills `logprob_N` on the way if it is given.
    """
    wanted = [p.detach().requires_grad_() for p in (weight_VD, bias_V) if p is not None]
    weight, bias = wanted[0], wanted[1] if bias_V is not None else None
    grad_ND = torch.empty_like(hidden_ND)
    sums: list[Tensor] = []
    for part in _chunks(len(token_N), rows):
        hidden = hidden_ND[part].detach().requires_grad_()
        with torch.enable_grad():
            logprob = _chunk_logprobs(hidden, weight, bias, token_N[part], head)
        if logprob_N is not None:
            logprob_N[part] = logprob.detach()
        grad_ND[part], *grads = torch.autograd.grad(logprob, [hidden, *wanted], upstream_N[part])
        if sums:
            torch._foreach_add_(sums, [_at_least_fp32(grad) for grad in grads])
        else:
            sums = [_at_least_fp32(grad) for grad in grads]
    return [grad_ND, *(sums or [torch.zeros_like(p) for p in wanted])]


def _chunk_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, head: Head) -> Tensor:
    return _gather_logprobs(nn.functional.linear(hidden.to(weight.dtype), weight, bias), token, head)


def _gather_logprobs(raw_logits: Tensor, token: Tensor, head: Head) -> Tensor:
    logits = head.transform(_at_least_fp32(raw_logits))
    return logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]


def _chunks(total: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


def _one_a_row(batch: Batch) -> bool:
    """One sequence a row, padded at its right: then a causal model needs no mask, and runs its faster kernel."""
    columns = torch.arange(batch.positions_BT.shape[1], device=batch.positions_BT.device)
    return bool(((batch.positions_BT == columns) | (batch.sequence_BT < 0)).all())


def _from_model_logits(model: nn.Module, inputs: dict[str, Any], target_BT: Tensor, token_N: Tensor) -> Tensor:
    """Through the model's own forward, at the columns that hold a target of any row."""
    columns = target_BT.any(0).nonzero()[:, 0]
    logits = model(**inputs, logits_to_keep=columns).logits
    logprobs = _at_least_fp32(logits[target_BT[:, columns]]).log_softmax(-1)
    return logprobs.gather(-1, token_N[:, None])[:, 0]


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _compute_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
