"""One forward pass over a batch: what it says about target tokens, sequences and experts.

The decoder runs once; of its hidden states only those that predict a target go on to the head.
Shapes: B rows, T tokens, N targets or sequences of the batch, D hidden size, C outputs of a value head, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.models.greedy import greedy_answers
from tunesmith.models.head import Head, Targets, at_least_fp32, score_targets
from tunesmith.models.load import decoder_of, value_head
from tunesmith.models.media import hidden_before_head, media_inputs
from tunesmith.phases import phase
from tunesmith.types import Batch, Scores, Wanted


@dataclass(frozen=True)
class Places:
    """Where the targets of a batch stand, and the tokens that they are predicted from; row by row."""

    row_N: Tensor
    column_N: Tensor
    before_N: Tensor
    """Column of the token before each target in its sequence."""

    def of(self, x_BT: Tensor) -> Tensor:
        """The targets' own, [N, …]."""
        return x_BT[self.row_N, self.column_N]

    def spread(self, x_N: Tensor, like_BT: Tensor) -> Tensor:
        """[B, T] with the targets' numbers in their places, and 0 elsewhere."""
        zeros = torch.zeros(like_BT.shape, dtype=x_N.dtype, device=x_N.device)
        return zeros.index_put((self.row_N, self.column_N), x_N)


class Columns:
    """Which columns of a batch's rows go through the model here, and how what is said of all of them comes together.

    All of them; base of those that share the columns out over ranks.
    """

    def run(self, model: nn.Module, module: nn.Module, batch: Batch, **more: Any) -> Any:
        """What a module of the model (the decoder, or itself) says of these columns."""
        return module(**_inputs(model, batch), **more)

    def here(self, places: Places) -> Places:
        """The targets that are predicted from these columns; `before_N` then counts among them."""
        return places

    def of(self, x_BT: Tensor, fill: int = 0) -> Tensor:
        """These columns of a tensor; `fill` in those beyond its end."""
        return x_BT

    def sum(self, x: Tensor) -> Tensor:
        """Sum over those that have the other columns, all of which then go on with the same loss."""
        return x

    def spread(self, x_BTC: Tensor) -> Tensor:
        """All columns, from those of each."""
        return x_BTC

    def all_targets(self, x_ND: Tensor, places: Places) -> Tensor:
        """For all targets, row by row, what each says of its own."""
        return x_ND


ALL = Columns()


def score(model: nn.Module, head: Head, batch: Batch, wanted: Wanted | None = None, columns: Columns = ALL) -> Scores:
    """Score a batch. Numbers about tokens are 0 where the batch's weight is 0: nothing is computed there."""
    wanted = wanted or Wanted()
    if wanted.generate is not None:
        nothing_BT = torch.zeros(batch.tokens_BT.shape, device=batch.tokens_BT.device)
        return Scores(nothing_BT, generated_NG=greedy_answers(model, batch, wanted.generate))
    noise = wanted.embedding_noise if model.training else 0.0
    with _noisy_embeddings(model, batch, noise, columns):
        if wanted.values:
            return _values(model, batch, columns)
        places = columns.here(target_places(batch))
        targets = targets_of(batch, wanted, places)
        router: list[Tensor] = []
        if head.linear is None:
            if wanted.router:
                raise UserError(
                    f"objective.router_loss: {type(model).__name__} makes its logits by a rule of its own; set it to 0"
                )
            main_N, others = targets.of_logits(at_least_fp32(_model_logits(model, batch, places, columns)))
        else:
            hidden_ND = _hidden_of_targets(model, head, batch, places, columns, router if wanted.router else None)
            with phase("logits"):
                main_N, others = score_targets(hidden_ND, head, targets)
    scores = scores_of(main_N, others, wanted, places, batch, columns)
    return replace(scores, balance_N=_balance(router, batch, _experts_per_token(model), columns)) if router else scores


def scores_of(
    main_N: Tensor, others: Tensor, wanted: Wanted, places: Places, batch: Batch, columns: Columns = ALL
) -> Scores:
    """What `Targets.of_logits` says of the targets, put in their places in the batch."""
    main_BT, *rest = (columns.sum(places.spread(x_N, batch.tokens_BT)) for x_N in (main_N, *others))
    logprobs_BT = main_BT if wanted.token_loss is None else rest.pop(0)
    return Scores(
        logprobs_BT,
        token_loss_BT=None if wanted.token_loss is None else main_BT,
        observed=dict(zip(wanted.observed, rest, strict=True)),
    )


def targets_of(batch: Batch, wanted: Wanted, places: Places) -> Targets:
    """The batch's targets, row by row."""
    columns = {name: places.of(column) for name, column in batch.token_columns.items()}
    return Targets(places.of(batch.tokens_BT), wanted, columns, places.of(batch.weights_BT))


def hidden_of_targets(model: nn.Module, head: Head, batch: Batch, columns: Columns = ALL) -> Tensor:
    """Hidden states [N, D] from which the targets are predicted, row by row."""
    places = target_places(batch)
    return columns.all_targets(_hidden_of_targets(model, head, batch, columns.here(places), columns, None), places)


def target_places(batch: Batch) -> Places:
    """Where the targets stand. The first own token of a sequence that shares its beginning follows on its parent's token."""
    row_N, column_N = (batch.weights_BT != 0).nonzero(as_tuple=True)
    before_N = column_N - 1
    if batch.parent_N is not None and batch.prefix_N is not None:
        sequence_N, position_N = batch.sequence_BT[row_N, column_N], batch.positions_BT[row_N, column_N]
        first_own = (batch.prefix_N > 0)[sequence_N] & (position_N == batch.prefix_N[sequence_N])
        parent_start_N = _start_columns(batch)[batch.parent_N[sequence_N]]
        before_N = torch.where(first_own, parent_start_N + position_N - 1, before_N)
    return Places(row_N, column_N, before_N)


def _start_columns(batch: Batch) -> Tensor:
    """For each sequence the column of its first own token, [N]."""
    width = batch.sequence_BT.shape[1]
    columns_BT = torch.arange(width, device=batch.sequence_BT.device).expand_as(batch.sequence_BT)
    here = batch.sequence_BT >= 0
    starts = torch.full((len(batch.sample_N),), width, device=batch.sequence_BT.device)
    return starts.scatter_reduce(0, batch.sequence_BT[here], columns_BT[here], "amin")


def _hidden_of_targets(
    model: nn.Module, head: Head, batch: Batch, places: Places, columns: Columns, router: list[Tensor] | None
) -> Tensor:
    """Of the targets that are here; a mixture of experts leaves its routers' logits in `router`."""
    if any(batch.media_N):
        hidden_BTD = hidden_before_head(model, head.linear, _inputs(model, batch))  # type: ignore[arg-type]
    elif router is None:
        hidden_BTD = columns.run(model, decoder_of(model), batch)[0]
    else:
        outputs = columns.run(model, decoder_of(model), batch, output_router_logits=True)
        hidden_BTD = outputs[0]
        router += outputs.router_logits
    return hidden_BTD[places.row_N, places.before_N]


def _values(model: nn.Module, batch: Batch, columns: Columns) -> Scores:
    hidden_BTD = columns.run(model, decoder_of(model), batch)[0]
    module = value_head(model)
    weight: Any = module.weight  # under lora in fp32, whatever the model's dtype
    with torch.autocast(hidden_BTD.device.type, enabled=False):
        values_BTC = columns.spread(at_least_fp32(module(hidden_BTD.to(weight.dtype))))
    return Scores(torch.zeros_like(values_BTC[..., 0]), values_BTC=values_BTC)


def _model_logits(model: nn.Module, batch: Batch, places: Places, columns: Columns) -> Tensor:
    """[N, V] through the model's own forward, at the columns that come before a target of any row."""
    if any(batch.media_N):
        return model(**_inputs(model, batch)).logits[places.row_N, places.before_N]
    kept, index_N = places.before_N.unique(return_inverse=True)
    return columns.run(model, model, batch, logits_to_keep=kept).logits[places.row_N, index_N]


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward."""
    inputs: dict[str, Any] = {"input_ids": batch.tokens_BT, "use_cache": False}
    if batch.parent_N is not None:
        inputs |= {"position_ids": batch.positions_BT, "attention_mask": _tree_mask(batch, compute_dtype(model))}
    elif not one_a_row(batch):
        # from positions that restart, transformers makes the mask that keeps packed sequences apart
        inputs["position_ids"] = batch.positions_BT
    if any(batch.media_N):
        inputs |= media_inputs(batch, model.dtype)  # type: ignore[arg-type]
    return inputs


def _tree_mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """What may be attended to, where sequences share their beginnings: [B, 1, T, T], 0 or the dtype's lowest number.

    A token sees those before it of its own sequence, and of its parent's shared beginning. Padding sees itself.
    """
    assert batch.parent_N is not None
    assert batch.prefix_N is not None
    sequence_BT, position_BT = batch.sequence_BT, batch.positions_BT
    own = sequence_BT[:, :, None] == sequence_BT[:, None, :]
    parent_BT, prefix_BT = batch.parent_N[sequence_BT], batch.prefix_N[sequence_BT]
    of_parent = (parent_BT[:, :, None] == sequence_BT[:, None, :]) & (position_BT[:, None, :] < prefix_BT[:, :, None])
    width = sequence_BT.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=sequence_BT.device).tril()
    allowed = (own | of_parent) & causal
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )[:, None]


def one_a_row(batch: Batch) -> bool:
    """One sequence a row, padded at its right: then a causal model needs no mask, and runs its faster kernel."""
    columns = torch.arange(batch.positions_BT.shape[1], device=batch.positions_BT.device)
    return bool(((batch.positions_BT == columns) | (batch.sequence_BT < 0)).all())


@contextmanager
def _noisy_embeddings(model: nn.Module, batch: Batch, alpha: float, columns: Columns) -> Iterator[None]:
    """NEFTune (Jain et al. 2023, arXiv 2310.05914, algorithm 1): uniform noise within ± alpha / sqrt(length × width)."""
    if not alpha:
        yield
        return
    here = batch.sequence_BT.clamp(min=0)
    length_BT = columns.of(batch.sequence_BT[batch.sequence_BT >= 0].bincount(minlength=len(batch.sample_N))[here], 1)

    def add_noise(_module: nn.Module, _arguments: Any, embedded_BTD: Tensor) -> Tensor:
        bound_BT = alpha / (length_BT * embedded_BTD.shape[-1]).float().sqrt()
        return embedded_BTD + (torch.rand_like(embedded_BTD) * 2 - 1) * bound_BT[..., None].to(embedded_BTD.dtype)

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def has_router(model: nn.Module) -> bool:
    """Whether the model is a mixture of experts that tells where it sends its tokens."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        outputs: Mapping[str, Any] = decoder_of(model)(input_ids=tokens, use_cache=False, output_router_logits=True)
    counts = getattr(model.config.get_text_config(), "num_experts_per_tok", None)  # type: ignore[union-attr, operator]
    return bool(outputs.get("router_logits")) and counts is not None


def _experts_per_token(model: Any) -> int:
    return int(model.config.get_text_config().num_experts_per_tok)


def _balance(router: list[Tensor], batch: Batch, experts_per_token: int, columns: Columns) -> Tensor:
    """Load-balancing loss of each sequence (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6), over all layers together, [N].

    Taken for each sequence and not for each micro-batch, so that it does not depend on how a batch is cut.
    """
    number = len(batch.sample_N)
    sequence_M = columns.of(batch.sequence_BT, -1).flatten()
    here = sequence_M >= 0
    logits_LME = torch.stack([at_least_fp32(logits.reshape(len(sequence_M), -1)) for logits in router])[:, here]
    probability_LME = logits_LME.softmax(-1)
    chosen_LME = torch.zeros_like(probability_LME).scatter_(-1, probability_LME.topk(experts_per_token).indices, 1.0)
    tokens_N = batch.sequence_BT[batch.sequence_BT >= 0].bincount(minlength=number).clamp(min=1)[:, None]
    shares = (
        columns.sum(
            torch.zeros(number, x.shape[-1], dtype=x.dtype, device=x.device).index_add(0, sequence_M[here], x.mean(0))
        )
        / tokens_N
        for x in (chosen_LME, probability_LME)
    )
    chosen_NE, probability_NE = shares
    return (chosen_NE * probability_NE).sum(-1) * probability_NE.shape[-1]


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Of the matrix products in the model."""
    parameter = next(model.parameters())
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
