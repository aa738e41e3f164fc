"""From numbers about tokens to numbers about sequences. Shapes: B rows, T tokens, N sequences of the whole batch, P pairs.

A micro-batch holds only some of the N sequences; the others' sums are 0. The log-probability of an answer is the sum over its
targets by their weights, and its length the sum of these weights: where all are 1, the plain sum and the number of targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.types import Batch


def sums(values_BT: Tensor, batch: Batch) -> Tensor:
    """For each sequence the sum of its tokens' values, [N]; differentiable."""
    here_BT = batch.sequence_BT >= 0
    zeros_N = torch.zeros(len(batch.sample_N), dtype=values_BT.dtype, device=values_BT.device)
    return zeros_N.index_add(0, batch.sequence_BT[here_BT], values_BT[here_BT])


def weighted_sums(values_BT: Tensor, batch: Batch) -> Tensor:
    """For each sequence the sum of its targets' values by their weights, [N]."""
    return sums(values_BT * batch.weights_BT.to(values_BT.dtype), batch)


def lengths(batch: Batch, like: Tensor) -> Tensor:
    """For each sequence the weight of its targets, at least 1e-9, in the dtype of `like`, [N]."""
    return sums(batch.weights_BT.to(like.dtype), batch).clamp(min=1e-9)


def present(batch: Batch) -> Tensor:
    """Numbers of the sequences that are in this micro-batch, in order; at most [N]."""
    found: Tensor = batch.sequence_BT[batch.sequence_BT >= 0].unique()
    return found


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Numbers of the chosen and of the rejected sequences of the pairs in this micro-batch, [P] each."""
    here = present(batch)
    return here[0::2], here[1::2]


def num_pairs(batch: Batch) -> Tensor:
    """How many pairs are in this micro-batch; scalar."""
    return torch.tensor(len(present(batch)) // 2)


def num_targets(batch: Batch) -> Tensor:
    """How many tokens are targets, whatever their weights; scalar."""
    return (batch.weights_BT != 0).sum()


def target_ranks(batch: Batch) -> Tensor:
    """Which of its sequence's targets a target is, from 1; int64 [B, T], any number elsewhere."""
    is_target_BT = batch.weights_BT != 0
    # the targets of a sequence stand in one row, after those of the sequences before it there
    count_BT = is_target_BT.cumsum(1)
    first_N = torch.full((len(batch.sample_N),), count_BT.shape[1], device=count_BT.device)
    first_N = first_N.scatter_reduce(0, batch.sequence_BT[is_target_BT], count_BT[is_target_BT], "amin")
    return count_BT - first_N[batch.sequence_BT] + 1


def at_last_token(values_BTC: Tensor, batch: Batch) -> Tensor:
    """What stands at each sequence's last token, [N, C]; 0 for sequences that are not here."""
    flat_M = batch.sequence_BT.flatten()
    here_M = (flat_M >= 0).nonzero()[:, 0]
    last_N = torch.full((len(batch.sample_N),), -1, device=flat_M.device)
    last_N = last_N.scatter_reduce(0, flat_M[here_M], here_M, "amax")
    found_NC = values_BTC.flatten(0, 1)[last_N.clamp(min=0)]
    return torch.where((last_N >= 0)[:, None], found_NC, 0.0)
