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

from tunesmith.types import Batch, Scores

CHUNK_ELEMENTS = 2**23
"""Logits held at once. 2^23 fp32 logits are 32 MiB: large enough for the matrix product to run at full speed."""


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
        """Scale and cap, in place where autograd does not look."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def score(model: nn.Module, head: Head, batch: Batch) -> Scores:
    """Score a batch. `logprobs_BT` is 0 where the batch's weight is 0: nothing is computed there."""
    inputs = {"input_ids": batch.tokens_BT, "position_ids": batch.positions_BT, "use_cache": False}
    target_BT = batch.weights_BT[:, 1:] != 0
    token_N = batch.tokens_BT[:, 1:][target_BT]
    if head.linear is None:
        logprob_N = _from_model_logits(model, inputs, target_BT, token_N)
    else:
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        hidden_ND = decoder(**inputs)[0][:, :-1][target_BT]
        logprob_N = token_logprobs(hidden_ND, token_N, head)
    logprobs_BT = torch.zeros(batch.tokens_BT.shape, dtype=logprob_N.dtype, device=logprob_N.device)
    logprobs_BT[:, 1:] = logprobs_BT[:, 1:].masked_scatter(target_BT, logprob_N)
    return Scores(logprobs_BT)


def token_logprobs(hidden_ND: Tensor, token_N: Tensor, head: Head) -> Tensor:
    """log p(token | hidden) for each row, [N], in at least fp32, chunked over rows."""
    linear = head.linear
    rows = max(1, CHUNK_ELEMENTS // _vocabulary(linear))
    if type(linear) is nn.Linear:
        return _LinearLogprobs.apply(
            hidden_ND, linear.weight, linear.bias, token_N, head, _compute_dtype(linear.weight), rows, torch.is_grad_enabled()
        )

    # an output layer that a method has wrapped (an adapter, a trained copy): same chunks, through the module itself
    def of_chunk(hidden: Tensor, token: Tensor) -> Tensor:
        logits = head.transform(_at_least_fp32(linear(hidden)))
        return logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)

    chunks = zip(hidden_ND.split(rows), token_N.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([of_chunk(hidden, token) for hidden, token in chunks])
    return torch.cat([checkpoint(of_chunk, hidden, token, use_reentrant=False) for hidden, token in chunks])


class _LinearLogprobs(torch.autograd.Function):
    """Chunked linear cross-entropy, per token and without the sign.

    A token's log-probability depends on its own hidden state alone, so its gradient there, (onehot - p) W, is taken in
    the forward pass, while the chunk's logits exist, and only scaled in the backward pass. A frozen head costs no second
    product with the vocabulary; the gradient of a trained one is made from recomputed chunks.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, token_N: Tensor,
        head: Head, dtype: torch.dtype, rows: int, with_grad: bool,
    ) -> Tensor:  # fmt: skip
        train_head = with_grad and (weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad))
        grad_now = with_grad and hidden_ND.requires_grad and not train_head
        compute_weight = weight_VD.to(dtype)
        logprob_N = torch.empty(token_N.shape, dtype=_at_least_fp32(hidden_ND[:0]).dtype, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if grad_now else None
        for start in range(0, len(token_N), rows):
            part = slice(start, start + rows)
            logits, slope = _logits(hidden_ND[part].to(dtype), compute_weight, bias_V, head)
            logprob = logits.log_softmax(-1)
            logprob_N[part] = logprob.gather(-1, token_N[part, None])[:, 0]
            if grad_ND is not None:
                grad_ND[part] = _grad_logits(logprob, token_N[part], slope).to(dtype) @ compute_weight
        ctx.head, ctx.dtype, ctx.rows = head, dtype, rows
        ctx.save_for_backward(*((grad_ND,) if not train_head else (hidden_ND, weight_VD, bias_V, token_N)))
        ctx.train_head = train_head
        return logprob_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.train_head:
            (grad_ND,) = ctx.saved_tensors
            return (grad_ND * grad_N[:, None].to(grad_ND.dtype), *[None] * 7)
        hidden_ND, weight_VD, bias_V, token_N = ctx.saved_tensors
        compute_weight = weight_VD.to(ctx.dtype)
        grad_ND = torch.empty_like(hidden_ND)
        grad_VD = torch.zeros(weight_VD.shape, dtype=_at_least_fp32(weight_VD[:0]).dtype, device=weight_VD.device)
        grad_V = None if bias_V is None else torch.zeros_like(grad_VD[:, 0])
        for start in range(0, len(token_N), ctx.rows):
            part = slice(start, start + ctx.rows)
            hidden = hidden_ND[part].to(ctx.dtype)
            logits, slope = _logits(hidden, compute_weight, bias_V, ctx.head)
            grad_logits = _grad_logits(logits.log_softmax(-1), token_N[part], slope).mul_(grad_N[part, None])
            if grad_V is not None:
                grad_V += grad_logits.sum(0)
            low = grad_logits.to(ctx.dtype)
            grad_ND[part] = low @ compute_weight
            grad_VD += low.T @ hidden
        bias_grad = None if grad_V is None else grad_V.to(bias_V.dtype)
        return grad_ND, grad_VD.to(weight_VD.dtype), bias_grad, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """Logits in at least fp32 and, where scaled or capped, their derivative by the raw product (else None)."""
    raw = _at_least_fp32(nn.functional.linear(hidden, weight, None if bias is None else bias.to(weight.dtype)))
    logits = head.transform(raw)
    if head.cap is not None:
        return logits, head.scale * (1 - (logits / head.cap) ** 2)
    return logits, None if head.scale == 1.0 else torch.full_like(raw[:1, :1], head.scale)


def _grad_logits(logprob: Tensor, token: Tensor, slope: Tensor | None) -> Tensor:
    """d log p(token) / d raw logits = (onehot - p) · slope; overwrites `logprob`."""
    grad = logprob.exp_().neg_()
    grad[torch.arange(len(token), device=token.device), token] += 1
    return grad if slope is None else grad.mul_(slope)


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


def _vocabulary(linear: nn.Module) -> int:
    return linear.weight.shape[0]  # type: ignore[union-attr,index,return-value]
