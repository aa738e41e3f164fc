"""Numbers about targets that need the logits of the whole vocabulary. Shapes: n targets, V vocabulary, K choices."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tunesmith.types import TokenTerm

Columns = Mapping[str, Tensor]


def entropy(logprobs_nV: Tensor, _token_n: Tensor, _columns: Columns) -> Tensor:
    """Of the next token's distribution, in nats, [n]; to be observed, so given log-probabilities."""
    return -(logprobs_nV.exp() * logprobs_nV).sum(-1)


def top_entropy(logits_nV: Tensor, k: int = 20) -> Tensor:
    """Entropy among the k likeliest tokens alone, over its largest value ln k: from 0 (certain) to 1, [n]."""
    k = min(k, logits_nV.shape[-1])
    top_nK = logits_nV.topk(k, -1).values.log_softmax(-1)
    return -(top_nK.exp() * top_nK).sum(-1) / log(k)


def gated_by_entropy(power: float) -> TokenTerm:
    """EAFT (Diao et al. 2026, arXiv 2601.02151): -g · log p with g = (entropy of the 20 likeliest tokens / ln 20)^power.

    No gradient goes through g: it only says how much a token counts.
    """

    def term(logits_nV: Tensor, token_n: Tensor, _columns: Columns) -> Tensor:
        gate_n = top_entropy(logits_nV.detach()) ** power
        return gate_n * cross_entropy(logits_nV, token_n, reduction="none")

    return term


def smoothed(label_smoothing: float, z_loss: float) -> TokenTerm:
    """-(1 - e) log p(token) - e · mean_v log p(v) + z · log² Z, where Z is the softmax's denominator.

    Label smoothing: Szegedy et al. 2016 (arXiv 1512.00567, section 7); z-loss: Chowdhery et al. 2022 (arXiv 2204.02311,
    section 5).
    """

    def term(logits_nV: Tensor, token_n: Tensor, _columns: Columns) -> Tensor:
        loss_n = cross_entropy(logits_nV, token_n, reduction="none", label_smoothing=label_smoothing)
        return loss_n + z_loss * logits_nV.logsumexp(-1) ** 2 if z_loss else loss_n

    return term


def choice_loss(logits_nV: Tensor, token_n: Tensor, columns: Columns) -> Tensor:
    """-log of the right label word's share of the probability that all label words have together, [n]."""
    right_n = logits_nV.gather(-1, token_n[:, None])[:, 0]
    return choice_logits(logits_nV, columns).logsumexp(-1) - right_n


def choice_accuracy(logits_nV: Tensor, token_n: Tensor, columns: Columns) -> Tensor:
    """1 where the right label word is the likeliest of them, else 0, [n]."""
    guess_n1 = choice_logits(logits_nV, columns).argmax(-1, keepdim=True)
    return (columns["choices"].gather(-1, guess_n1)[:, 0] == token_n).to(logits_nV.dtype)


def choice_logits(logits_nV: Tensor, columns: Columns) -> Tensor:
    """Of the label words' tokens, [n, K]; -inf where a row has fewer than K."""
    choice_nK = columns["choices"]
    return logits_nV.gather(-1, choice_nK.clamp(min=0)).masked_fill(choice_nK < 0, -torch.inf)
