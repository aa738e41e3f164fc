"""Rows cut over ranks: each has some columns of every row, and of the others only the keys and values.

A row of T columns (padded) is 2n chunks over n ranks, of which rank r has chunks r and 2n-1-r: causal attention is then as much
work on every rank. Queries stay where they are; keys and values are gathered in each layer, and their gradients
summed and dealt out in the backward pass. All that is about tokens one by one needs no exchange, and what is said of tokens is
summed into [B, T] on every rank, so that losses see whole rows.

Shapes: B rows, T columns in all and t here, c in a chunk, H heads, E numbers of a head's key and value together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.nn.functional import pad, scaled_dot_product_attention

from tunesmith.errors import UserError
from tunesmith.models.score import Columns, Places, one_a_row
from tunesmith.types import Batch

WIDE = 8
"""Columns in a chunk are a multiple of it on an accelerator, whose kernels read masks so."""

CHANGES = ("s_aux", "softcap", "position_bias")
"""What some architectures ask of attention beside a mask."""


# by the names that they have from torch 2.13 on, or by the older ones
all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Sight:
    """What the queries of a chunk may see."""

    first: int
    stop: int
    """Columns of the keys."""
    bias: Tensor | None
    """[B or 1, 1, c, stop - first]: 0 or -inf; None: each query sees all columns up to its own."""


class ContextParallel:
    """The ranks of one context group, and the attention by which their columns see each other."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self.group, self.device = group, device
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.multiple = 1 if device.type == "cpu" else WIDE
        self.name = f"tunesmith_context_{id(self)}"
        self.cut: Cut | None = None
        """Under which the model runs now; None: it reads whole rows, as on a single device."""
        AttentionInterface.register(self.name, self.attend)
        AttentionMaskInterface.register(self.name, self.mask)

    def attach(self, model: Any) -> None:
        """Let all layers attend by this."""
        model.set_attn_implementation(self.name)

    def mask(self, **asked: Any) -> Any:
        """In place of transformers' own masks: the sights of this rank's two chunks."""
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(**asked) if self.cut is None else self.cut.sights(asked)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
        scaling: float | None = None, dropout: float = 0.0, **more: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attention as transformers calls it: [B, H, t, …] → [B, t, H, …]."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if not isinstance(attention_mask, tuple):
            if self.cut is not None:
                raise unable(f"{type(module).__name__} makes its masks by a rule of its own")
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
            )
        if others := [name for name in CHANGES if more.get(name) is not None]:
            raise unable(f"{type(module).__name__} attends with {others[0]}")
        return self._attend_cut(query, key, value, attention_mask, scaling, dropout), None

    @torch.compiler.disable  # exchanges, and shapes that differ from rank to rank, between the compiled parts of a block
    def _attend_cut(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sights: tuple[Sight, ...],
        scaling: float | None,
        dropout: float,
    ) -> Tensor:
        if torch.is_autocast_enabled(query.device.type):
            query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
        key, value = self.gather(torch.cat([key, value], -1)).split([key.shape[-1], value.shape[-1]], -1)
        found = [
            _attend(chunk, key, value, sight, scaling, dropout)
            for chunk, sight in zip(query.chunk(2, dim=2), sights, strict=True)
        ]
        return torch.cat(found, dim=2).transpose(1, 2).contiguous()

    def gather(self, x_BHtE: Tensor) -> Tensor:
        """All columns in their order, [B, H, T, E]; gradients are summed over ranks."""
        return _Gather.apply(x_BHtE, self)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks that all go on with the same loss: the gradient of each one's part is that of the sum."""
        return _Sum.apply(x, self.group)


def _attend(query: Tensor, key: Tensor, value: Tensor, sight: Sight, scaling: float | None, dropout: float) -> Tensor:
    """One chunk of queries, [B, H, c, …], over all columns of keys and values."""
    bias = sight.bias
    if bias is not None and len(bias) > 1:
        each = zip(*(x.split(1) for x in (query, key, value, bias)), strict=True)
        return torch.cat([_attend(q, k, v, replace(sight, bias=b), scaling, dropout) for q, k, v, b in each])
    key, value = key[:, :, sight.first : sight.stop], value[:, :, sight.first : sight.stop]
    rows, heads, shared = len(query), key.shape[1], query.shape[1] // key.shape[1]
    # each head of keys is a row of its own, that the queries of its group read without a copy
    query = query.reshape(rows * heads, shared, *query.shape[2:])
    key, value = (x.flatten(0, 1)[:, None].expand(-1, shared, -1, -1) for x in (key, value))
    whole = CausalVariant.LOWER_RIGHT, query.shape[2], key.shape[2]
    seen = LowerRight(*whole) if bias is None else bias.to(query.dtype)
    out = scaled_dot_product_attention(query, key, value, seen, dropout, scale=scaling)
    return out.reshape(rows, heads * shared, *out.shape[2:])


class LowerRight(CausalBias):
    """Says that the last query sees all keys, the one before it all but one, and so on; torch's own also takes memory for
    2 × queries × keys numbers, which it never reads."""

    def __new__(cls, variant: CausalVariant, queries: int, keys: int) -> LowerRight:
        return torch.Tensor._make_subclass(cls, torch.empty(0, dtype=torch.long))


class Cut(Columns):
    """One batch's columns on this rank."""

    def __init__(self, context: ContextParallel, batch: Batch) -> None:
        if any(batch.media_N):
            raise unable("images, audio and video must be seen with the whole row")
        if batch.parent_N is not None:
            raise unable("continuations of a shared prompt must stand in one piece")
        self.context, self.batch = context, batch
        device, self.width = batch.tokens_BT.device, batch.tokens_BT.shape[1]
        chunks = 2 * context.world
        self.chunk = -(-self.width // (chunks * context.multiple)) * context.multiple
        self.padded = chunks * self.chunk
        self.starts = tuple(number * self.chunk for number in (context.rank, chunks - 1 - context.rank))
        self.column_t = torch.cat([torch.arange(start, start + self.chunk, device=device) for start in self.starts])
        self.one_a_row = one_a_row(batch)

    def run(self, model: nn.Module, module: nn.Module, batch: Batch, **more: Any) -> Any:
        inputs = {
            "input_ids": self.of(batch.tokens_BT),
            "position_ids": self.of(batch.positions_BT),
            "use_cache": False,
        }
        # a mask of the row's whole width says how many keys there are, and that nobody is to guess sequences from positions
        whole_BT = torch.ones(len(batch.tokens_BT), self.padded, dtype=torch.bool, device=self.column_t.device)
        self.context.cut = self
        try:
            return module(**inputs, attention_mask=whole_BT, **more)
        finally:
            self.context.cut = None

    def of(self, x_BT: Tensor, fill: int = 0) -> Tensor:
        return pad(x_BT, (0, self.padded - self.width), value=fill)[:, self.column_t]

    def here(self, places: Places) -> Places:
        local_T = torch.full((self.padded,), -1, device=self.column_t.device)
        local_T[self.column_t] = torch.arange(len(self.column_t), device=self.column_t.device)
        before_N = local_T[places.before_N]
        mine = before_N >= 0
        return Places(places.row_N[mine], places.column_N[mine], before_N[mine])

    def sum(self, x: Tensor) -> Tensor:
        return self.context.sum(x)

    def spread(self, x_BTC: Tensor) -> Tensor:
        zeros = x_BTC.new_zeros(len(x_BTC), self.padded, *x_BTC.shape[2:])
        return self.sum(zeros.index_copy(1, self.column_t, x_BTC)[:, : self.width])

    def all_targets(self, x_ND: Tensor, places: Places) -> Tensor:
        mine = torch.isin(places.before_N, self.column_t).nonzero()[:, 0]
        return self.sum(x_ND.new_zeros(len(places.row_N), x_ND.shape[1]).index_copy(0, mine, x_ND))

    def sights(self, asked: dict[str, Any]) -> tuple[Sight, ...]:
        """For each chunk what transformers' mask function and the borders of sequences let it see."""
        from transformers.masking_utils import causal_mask_function

        if asked.get("use_vmap"):
            raise unable("its masks depend on what the tokens are")
        rule, device = asked["mask_function"], self.column_t.device
        if rule is causal_mask_function and self.one_a_row:
            return tuple(Sight(0, start + self.chunk, None) for start in self.starts)
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else asked["dtype"]
        return tuple(self._sight(rule, start, dtype) for start in self.starts)

    def _sight(self, rule: Callable[..., Tensor], start: int, dtype: torch.dtype) -> Sight:
        device, stop = self.column_t.device, start + self.chunk
        row_B = torch.arange(len(self.batch.tokens_BT), device=device)[:, None, None, None]
        query_c = torch.arange(start, stop, device=device)[None, None, :, None]
        key_K = torch.arange(stop, device=device)[None, None, None]
        allowed = rule(row_B, torch.zeros_like(row_B[:1]), query_c, key_K)
        if not self.one_a_row:
            sequence_BT = pad(self.batch.sequence_BT, (0, self.padded - self.width), value=-1)
            allowed = allowed & (sequence_BT[:, None, start:stop, None] == sequence_BT[:, None, None, :stop])
        first = int(allowed.any(2).any(1).any(0).long().argmax()) // WIDE * WIDE
        allowed = allowed[..., first:]
        return Sight(
            first, stop, torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)
        )


class _Gather(torch.autograd.Function):
    """See `ContextParallel.gather`."""

    @staticmethod
    def forward(ctx: Any, x_BHtE: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        found = x_BHtE.new_empty(context.world, *x_BHtE.shape)
        all_gather(found.flatten(0, 1), x_BHtE.contiguous(), group=context.group)
        low, high = found.unflatten(3, (2, -1)).unbind(3)  # [n, B, H, c, E] each
        return torch.cat([low, high.flip(0)]).permute(1, 2, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad_BHTE: Tensor) -> tuple[Tensor, None]:
        context: ContextParallel = ctx.context
        low, high = grad_BHTE.unflatten(2, (2, context.world, -1)).unbind(2)  # [B, H, n, c, E] each
        parts = torch.stack([low, high.flip(2)], dim=3).flatten(3, 4).movedim(2, 0).contiguous()  # [n, B, H, t, E]
        own = torch.empty_like(parts[0])
        reduce_scatter(own, parts.flatten(0, 1), group=context.group)
        return own, None


class _Sum(torch.autograd.Function):
    """See `ContextParallel.sum`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def wire_bytes(
    layers: int, key_value_numbers: int, rows: int, tokens: int, ranks: int, element_bytes: int, checkpointing: bool = False,
    trained_layers: int | None = None,
) -> int:  # fmt: skip
    """Bytes that a rank receives (and sends as many) for keys and values in a forward and a backward pass of a micro-batch.

    key_value_numbers: of a token's key and value together in one layer, 2 × heads of keys × head size in most models.
    checkpointing: blocks run twice. trained_layers: those whose keys and values have a gradient; None: all.
    """
    one_way = rows * tokens * key_value_numbers * element_bytes * (ranks - 1) // ranks
    backward = layers if trained_layers is None else trained_layers
    return one_way * (layers * (1 + checkpointing) + backward)


def unable(why: str) -> UserError:
    return UserError(f"engine.context_parallel: rows cannot be cut over ranks here, since {why}; set it to 1")
