"""A model, its engine and its method: the only place where the three meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tunesmith.engines import SingleEngine
from tunesmith.methods import Method
from tunesmith.methods.base import LossFn
from tunesmith.models.low_rank import Probe
from tunesmith.objectives import Objective
from tunesmith.phases import phase
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
        with self.engine.adapting(self.model):
            self.method.adapt(self.model)
        self.model = self.engine.place(self.model)
        self.method.bind(self.model, self.engine)
        self.model.train()

    def step(self, objective: Objective, batch: Batch, lr: float) -> Metrics:
        """One update on one prepared batch, which is whole on all ranks; what of it goes through the model here is the method's
        and the engine's business."""
        loss_fn, parts = self._work(objective, batch)
        metrics = quotients(self.method.step(loss_fn, parts, lr))
        metrics |= objective.derived(metrics)
        objective.update(metrics)
        return metrics | {"target_tokens": (batch.weights_BT != 0).sum(), "tokens": batch.num_tokens()}

    def rehearse(self, objective: Objective, batch: Batch) -> None:
        """What a step does before its update; nothing is changed by it."""
        self.method.rehearse(*self._work(objective, batch))

    def _work(self, objective: Objective, batch: Batch) -> tuple[LossFn, list[Batch]]:
        """The loss of a micro-batch, as a part of the whole batch's, and the micro-batches."""
        count = objective.count(batch).clamp(min=1)

        def loss_fn(micro_batch: Batch, probes: Sequence[Probe] = ()) -> tuple[Tensor, Metrics]:
            micro_batch = micro_batch.to(self.engine.device)
            if probes:
                return self._losses(objective, micro_batch, probes, count)
            with phase("forward"):
                scores = self.engine.score(self.model, micro_batch, objective.wanted)
                loss, metrics = objective.loss(scores, micro_batch)
                return loss / count, metrics

        return loss_fn, self.method.micro_batches(batch, self.micro_batch_tokens)

    def _losses(
        self, objective: Objective, micro_batch: Batch, probes: Sequence[Probe], count: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The loss at each of K states [K], the metrics there [K, …], and `share`: how much of the whole count is here."""
        scorer = self.method.scorer  # type: ignore[attr-defined]
        found = [objective.loss(scores, micro_batch) for scores in scorer.score(micro_batch, objective.wanted, probes)]
        losses_K = torch.stack([loss.double() for loss, _ in found]) / count
        metrics = {name: torch.stack([metrics[name] for _, metrics in found]).double() for name in found[0][1]}
        return losses_K, metrics | {"share": (objective.count(micro_batch) / count).double()}

    @torch.no_grad()
    def evaluate(self, objective: Objective, batches: Iterable[Batch], helpers: Mapping[str, Any]) -> Metrics:
        """The objective's loss and metrics over held-out batches, without a step. Ranks of a group share the batches out."""
        group = self.engine.group
        while True:
            ranks = group.ranks
            own = self.sums(objective, islice(batches, ranks.index(group.rank), None, len(ranks)), helpers)
            found = group.gather({name: value.tolist() for name, value in own.items()})
            if len(found) == len(ranks):  # else anew: one was lost, and its batches with it
                break
        sums: Metrics = {}
        for name, value in ((name, value) for part in found.values() for name, value in part.items()):
            sums[name] = sums.get(name, 0.0) + torch.tensor(value, dtype=torch.float64)
        metrics = quotients(self.engine.sums(sums))
        return metrics | objective.derived(metrics)

    @torch.no_grad()
    def sums(self, objective: Objective, batches: Iterable[Batch], helpers: Mapping[str, Any]) -> Metrics:
        """(sum, count) of the loss and of each metric over the batches."""
        self.model.eval()
        self.method.drop_gradients()
        sums: Metrics = {}
        for batch in batches:
            for ready in objective.prepare(batch, helpers):
                for micro_batch in self.engine.micro_batches(ready, self.micro_batch_tokens):
                    micro_batch = micro_batch.to(self.engine.device)
                    with phase("evaluation"):
                        scores = self.method.score(micro_batch, objective.wanted)
                        loss, metrics = objective.loss(scores, micro_batch)
                    total = torch.stack([loss, objective.count(micro_batch).to(loss)])
                    for name, value in {"loss": total, **metrics}.items():
                        sums[name] = sums.get(name, 0.0) + value.cpu().double()
        self.model.train()
        return sums

    @torch.no_grad()
    def logprobs(self, batch: Batch, at_start: bool = False) -> Tensor:
        """Log-probabilities of the batch's targets without gradient and dropout, [B, T] on the CPU.

        `at_start`: of the model as it was before training.
        """
        was_training = self.model.training
        self.model.eval()
        with self.method.at_start() if at_start else nullcontext():
            found = logprobs_of(self.model, self.engine, batch, self.micro_batch_tokens)
        self.model.train(was_training)
        return found


def logprobs_of(model: Any, engine: SingleEngine, batch: Batch, micro_batch_tokens: int) -> Tensor:
    """Log-probabilities of a whole batch's targets, micro-batch by micro-batch, [B, T] on the CPU. Ranks share the rows out."""
    parts = engine.micro_batches(batch, micro_batch_tokens)
    with phase("reference"):
        pieces = [engine.score(model, part.to(engine.device)).logprobs_BT for part in parts]
    width = batch.tokens_BT.shape[1]
    found = torch.cat([torch.nn.functional.pad(piece, (0, width - piece.shape[1])) for piece in pieces])
    rows = engine.rows(batch)
    logprobs_BT = found.new_zeros(batch.tokens_BT.shape)
    logprobs_BT[rows] = found[: rows.stop - rows.start]  # behind them is what other ranks had in excess
    return engine.sum(logprobs_BT).cpu()


def quotients(metrics: Mapping[str, Tensor]) -> Metrics:
    """(sum, count) pairs divided; those of which nothing was counted are left out."""
    return {
        name: value[0] / value[1] if value.ndim else value
        for name, value in metrics.items()
        if not value.ndim or value[1] != 0
    }
