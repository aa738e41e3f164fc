"""A model, its engine and its method: the only place where the three meet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.engines import SingleEngine
from tunesmith.methods import Method
from tunesmith.objectives import Objective
from tunesmith.types import Batch

Metrics = dict[str, Tensor]


@dataclass
class Learner:
    """Takes steps. Losses are sums; the division by the global count happens here, once."""

    model: Any
    engine: SingleEngine
    method: Method
    micro_batch_tokens: int

    def __post_init__(self) -> None:
        self.method.adapt(self.model)
        self.model = self.engine.place(self.model)
        self.method.bind(self.model, self.engine)
        self.model.train()

    def step(self, objective: Objective, batch: Batch, lr: float) -> Metrics:
        """One update on one prepared batch."""
        count = self.engine.sum(objective.count(batch)).clamp(min=1)

        def loss_fn(micro_batch: Batch) -> tuple[Tensor, Metrics]:
            micro_batch = micro_batch.to(self.engine.device)
            scores = self.engine.score(self.model, micro_batch, objective.reads)
            loss, metrics = objective.loss(scores, micro_batch)
            return loss / count, {name: value / count for name, value in metrics.items()}

        metrics = self.method.step(loss_fn, batch.split(self.micro_batch_tokens), lr)
        tokens = {"target_tokens": (batch.weights_BT != 0).sum(), "tokens": batch.num_tokens()}
        return metrics | {name: self.engine.sum(number) for name, number in tokens.items()}

    @torch.no_grad()
    def evaluate(self, objective: Objective, batches: Iterable[Batch]) -> Metrics:
        """The objective's loss and metrics over held-out batches, without a step."""
        self.model.eval()
        sums: Metrics = {}
        for batch in batches:
            batch = self.engine.shard(batch)
            for micro_batch in batch.split(self.micro_batch_tokens):
                micro_batch = micro_batch.to(self.engine.device)
                scores = self.engine.score(self.model, micro_batch, objective.reads)
                loss, metrics = objective.loss(scores, micro_batch)
                for name, value in {"count": objective.count(micro_batch), "loss": loss, **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + value.cpu().double()
        self.model.train()
        totals = {name: self.engine.sum(value) for name, value in sums.items()}
        count = totals.pop("count")
        return {name: value / count for name, value in totals.items()}
