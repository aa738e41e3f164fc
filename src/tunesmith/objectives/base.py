"""What an objective is: a function of scores. It never sees the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tunesmith.types import Batch, Form, Scores, Wanted

Metrics = dict[str, Tensor]
"""Name → what `mean` makes: the learner adds them up over micro-batches and ranks, and reports the quotients."""


class Objective:
    """Base of all objectives. Losses are sums over a micro-batch; the learner divides once, by the global count."""

    needs: frozenset[str] = frozenset()
    """Helpers to build: policy, reference, teacher, tokenizer."""
    reads: frozenset[str] = frozenset()
    """Parts of Scores beyond the log-probabilities: logits (token_loss, observed), choices (the same among a few tokens),
    values, router, embeddings, generated."""
    wanted: Wanted = Wanted()
    """The same in detail."""
    form: ClassVar[Form] = "answers"
    head: ClassVar[Literal["language", "sequence", "token"]] = "language"
    """Which model of transformers' is trained: for language modelling, or for classification of sequences or tokens."""
    num_labels: ClassVar[int] = 0
    """Outputs of the value head, where `head` is not language."""
    no_gradient: str = ""
    """The setting that makes the loss one without gradient, as a message names it; empty where there is a gradient."""
    unit: str = "nats per target token"
    """Of the loss, for plots."""
    shows: ClassVar[tuple[str, ...]] = ()
    """Metrics that stand beside the loss in the terminal and the report."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare(self, batch: Batch, helpers: Mapping[str, Any]) -> Iterable[Batch]:
        """What is to be done once per batch and without gradient; yields the batches to step on."""
        yield batch

    def count(self, batch: Batch) -> Tensor:
        """The denominator of the loss over this batch: tokens, pairs or sequences; scalar."""
        raise NotImplementedError

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss summed over the micro-batch, scalar; and metrics, each made by `mean`."""
        raise NotImplementedError

    def derived(self, metrics: Mapping[str, Tensor]) -> Metrics:
        """Further metrics, scalars, made of those of a whole batch."""
        return {}

    def update(self, metrics: Mapping[str, Tensor]) -> None:
        """Learn from a step's metrics, for an objective that keeps a running number."""

    def state_dict(self) -> dict[str, Any]:
        """What `update` has learnt, for the checkpoint."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """The inverse."""


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """A metric: (sum, count) of the values, weighted; [2], without gradient."""
    values = values.detach()
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    return torch.stack([(values * weights).sum(), weights.sum()])
