"""Batches and scores made by hand. Sequences are given by their weights; what a token is worth depends on its sequence and
position alone, so that the same sequences can be laid out in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tunesmith.objectives import Objective
from tunesmith.types import Batch, Scores


def ragged_weights(lengths: Sequence[int], prompts: Sequence[int]) -> list[list[float]]:
    """0 on each prompt, 1 on each answer."""
    return [[0.0] * prompt + [1.0] * (length - prompt) for length, prompt in zip(lengths, prompts, strict=True)]


PAIR_WEIGHTS = ragged_weights((7, 5, 9, 12, 6, 6, 4, 8), (3, 3, 2, 2, 4, 4, 1, 1))
"""Four pairs: the chosen answer shorter, longer, as long."""


def make_batch(
    weights: Sequence[Sequence[float]],
    rows: Sequence[Sequence[int]] | None = None,
    group_size: int = 1,
    shared: int = 0,
    labels: Sequence[float] | None = None,
) -> Batch:
    """Sequences laid out in rows (default: one a row). `shared`: so many first tokens of a group stand once, as its first's."""
    rows = rows or [[n] for n in range(len(weights))]
    prefix = [shared if n % group_size else 0 for n in range(len(weights))]
    width = max(sum(len(weights[n]) - prefix[n] for n in row) for row in rows)
    shape = len(rows), width
    batch = Batch(
        tokens_BT=torch.zeros(shape, dtype=torch.long),
        positions_BT=torch.zeros(shape, dtype=torch.long),
        sequence_BT=torch.full(shape, -1),
        weights_BT=torch.zeros(shape),
        sample_N=torch.arange(len(weights)) // group_size,
        group_N=torch.arange(len(weights)) // group_size,
        parent_N=torch.tensor([n - n % group_size for n in range(len(weights))]) if shared else None,
        prefix_N=torch.tensor(prefix) if shared else None,
    )
    for r, row in enumerate(rows):
        start = 0
        for n in row:
            own = torch.arange(prefix[n], len(weights[n]))
            place = r, slice(start, start + len(own))
            batch.tokens_BT[place], batch.positions_BT[place] = 10 * n + own, own
            batch.sequence_BT[place], batch.weights_BT[place] = n, torch.tensor(weights[n][prefix[n] :])
            start += len(own)
    label_N = torch.zeros(len(weights)) if labels is None else torch.tensor(labels)
    return batch.with_columns(sequences={"label": label_N})


def numbers(batch: Batch, seed: int = 0, width: int | None = None) -> Tensor:
    """fp64 numbers in (-2, 0) that depend on sequence and position alone, [B, T] or [B, T, width]; 0 on padding."""
    longest = 64
    table = -2 * torch.rand(len(batch.sample_N), longest, width or 1, dtype=torch.float64, generator=_generator(seed))
    found = table[batch.sequence_BT, batch.positions_BT] * (batch.sequence_BT >= 0)[..., None]
    return found if width else found[..., 0]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logprobs(batch: Batch, seed: int = 0) -> Tensor:
    """The same, where the batch has targets."""
    return numbers(batch, seed) * (batch.weights_BT != 0)


class Fixed:
    """A helper that knows log-probabilities: the same for a sequence's n-th token in every layout."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        self.seed, self.scale = seed, scale

    def logprobs(self, batch: Batch) -> Tensor:
        return self.scale * logprobs(batch, self.seed)


POLICY = Fixed(0)
"""Says what `logprobs(batch)` says."""
REFERENCE = Fixed(1, scale=1.5)
"""Finds all a little less likely."""


class Numbered:
    """A tokenizer whose words are the tokens' numbers."""

    end_tokens = ()

    def texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return [" ".join(map(str, tokens)) for tokens in sequences]


def prepared(objective: Objective, batch: Batch, policy: Fixed = POLICY, reference: Fixed = REFERENCE) -> Batch:
    (ready,) = objective.prepare(batch, {"policy": policy, "reference": reference, "tokenizer": Numbered()})
    return ready


def part_of(scores: Scores, start: int, piece: Batch) -> Scores:
    """Scores of a micro-batch, of those of the whole batch; it begins at row `start`."""
    rows, width = piece.tokens_BT.shape
    used = slice(start, start + rows), slice(0, width)
    balance_N = scores.balance_N
    if balance_N is not None:
        here = torch.isin(torch.arange(len(balance_N)), piece.sequence_BT)
        balance_N = balance_N * here
    generated_NG = scores.generated_NG
    if generated_NG is not None:
        here = torch.isin(torch.arange(len(generated_NG)), piece.sequence_BT)
        generated_NG = generated_NG.masked_fill(~here[:, None], -1)
    return replace(
        scores,
        logprobs_BT=scores.logprobs_BT[used],
        token_loss_BT=None if scores.token_loss_BT is None else scores.token_loss_BT[used],
        observed={name: x[used] for name, x in scores.observed.items()},
        values_BTC=None if scores.values_BTC is None else scores.values_BTC[used],
        balance_N=balance_N,
        generated_NG=generated_NG,
    )


def make_scores(objective: Objective, batch: Batch) -> Scores:
    """What the objective wants of a batch, in fp64; what carries gradient are leaves."""
    wanted, is_target = objective.wanted, batch.weights_BT != 0
    return Scores(
        logprobs(batch).requires_grad_(),
        token_loss_BT=(numbers(batch, 2) * is_target).requires_grad_() if wanted.token_loss else None,
        observed={name: -numbers(batch, 3) * is_target for name in wanted.observed},
        values_BTC=numbers(batch, 4, objective.num_labels).requires_grad_() if wanted.values else None,
        balance_N=torch.linspace(1, 2, len(batch.sample_N), dtype=torch.float64) if wanted.router else None,
        generated_NG=half_right(batch) if wanted.generate else None,
    )


def half_right(batch: Batch) -> Tensor:
    """Of each answer's tokens every second one, and one that is wrong."""
    given = [[*answer[::2].tolist(), 999] for _, answer in batch.questions()]
    return torch.tensor([tokens + [-1] * (16 - len(tokens)) for tokens in given])
