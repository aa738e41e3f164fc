"""A run's parts on tensors without numbers, and one step of it: what is held at each moment, and what is computed.

The step is the run's own: its model, objective, method and data, by the same code. It is that with the largest micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from tunesmith.assemble import Run, assemble
from tunesmith.config import RunConfig
from tunesmith.data.dataset import EvaluationBatches
from tunesmith.data.prepare import unwatched
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.methods.noise import quantiles
from tunesmith.phases import watching
from tunesmith.plan.engine import ForeseenEngine
from tunesmith.plan.helpers import foreseen_helpers
from tunesmith.plan.ledger import Ledger, Peak, Peaks, Work
from tunesmith.plan.shadow import Shadow
from tunesmith.plan.worst import largest_first, pieces, size, worst_batch
from tunesmith.run_data import RunData
from tunesmith.types import Batch

TRACED = 2
"""Micro-batches of a step that are traced: the largest, and the largest of those that come when there are gradients already."""


@dataclass(frozen=True)
class Traced(Peaks):
    """One step, and what comes before and after it."""

    peaks: Mapping[str, Peak]
    rows: int
    """Of the largest micro-batch."""
    width: int
    """Tokens of its longest row."""
    flops: int
    """Of what was traced: a micro-batch or two, and an update. Matrix products, attention and convolutions. On average where
    steps differ."""
    moved: int
    """Bytes that its other operations read and write."""
    operations: int
    tokens: int
    """That were traced, padding included."""
    parameters: int
    trained: int


def trace(data: RunData, precision: str, kind: str | None = None) -> Traced:
    """Foresee a run on one device. kind: of the device, cuda or cpu, if another is meant than the run's. Raises UserError."""
    config = data.config
    keep_numbers(config)
    shadow = Shadow()
    is_apart = (kind or _kind(config.engine.device)) != "cpu"
    with ExitStack() as stack:
        engine = ForeseenEngine(config.engine, precision, shadow, stack, is_apart)
        try:
            run = assemble(data, engine, unwatched, foreseen_helpers)
            with shadow.off():
                batch, held_out = worst_batch(run), held_out_batch(run)
            held_out = None if held_out is None else first(run, held_out)
            return _trace(run, first(run, batch), held_out)
        except RuntimeError as error:  # torch's for what needs numbers
            raise UserError(
                f"{config.model.path}: this model cannot be foreseen, since it does not compute with tensors without numbers "
                f"({str(error).splitlines()[0]})"
            ) from error


def keep_numbers(config: RunConfig) -> None:
    """Let be computed with numbers what code computes once and keeps: a run in this process would find it without."""
    if config.method.name == "zeroth":
        quantiles("cpu")
    if config.optimizer.name == "adamw8bit":
        from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

        get_qmap_signed()
        get_qmap_unsigned()


def _trace(run: Run, batch: Batch, held_out: Batch | None) -> Traced:
    learner = run.learner
    ledger = Ledger(("on disk", "on the host") if learner.engine.is_apart else ("on disk",))
    work: list[Work] = []
    steps = learner.method.unlike_steps()
    with torch.compiler.set_stance("force_eager"):
        next(steps)  # what comes before is no part of a step
    with recorded(run, ledger):
        for _ in chain([None], steps):
            before = ledger.work
            take_step(run, batch, ledger)
            work.append(ledger.work - before)
            if held_out is not None:
                learner.sums(run.objective, [held_out], run.helpers)
    if run.config.optimizer.name == "adamw8bit":  # runs compiled, without what it makes on the way as it is traced
        ledger.peaks.pop("update", None)
    flops, moved, operations = (sum(each) // len(work) for each in zip(*work, strict=True))
    taken = learner.method.micro_batches(batch, learner.micro_batch_tokens)
    largest = largest_first(taken)[0]
    shapes = [p.numel() for p in learner.model.parameters()]
    trained = sum(p.numel() for p in learner.method.params.values())
    rows, width = largest.tokens_BT.shape
    tokens = sum(piece.tokens_BT.numel() for piece in taken)
    return Traced(dict(ledger.peaks), rows, width, flops, moved, operations, tokens, sum(shapes), trained)


def first(run: Run, batch: Batch) -> Batch:
    """Of a batch the rows that go through the model first, in as many micro-batches as are traced."""
    taken = run.learner.engine.micro_batches(batch, run.learner.micro_batch_tokens)[:TRACED]
    return batch.rows(0, sum(len(piece.tokens_BT) for piece in taken))


def held_out_batch(run: Run) -> Batch | None:
    """Of the held-out batches that with the largest micro-batch."""
    if not len(run.held_out):
        return None
    config = run.config
    batches = EvaluationBatches(run.held_out, config.train.batch_size, config.data.max_tokens, run.pack, run.share)
    each = run.held_out.lengths().sum(1)
    starts = np.arange(0, len(each), config.train.batch_size)
    candidates = {int(np.maximum.reduceat(each, starts).argmax()), int(np.add.reduceat(each, starts).argmax())}
    return max((batches[n] for n in sorted(candidates)), key=lambda batch: size(pieces(run, batch)))


def take_step(run: Run, batch: Batch, ledger: Ledger) -> None:
    """One update on a batch."""
    for ready in run.objective.prepare(batch, run.helpers):
        run.learner.step(run.objective, ready, 1e-6)
    ledger.name(run.learner.method.states(), "optimizer state")


@contextmanager
def recorded(run: Run, ledger: Ledger) -> Iterator[None]:
    """Inside, what the run holds is in the ledger: weights, gradients and optimizer state by name, the rest by phase.

    What is compiled runs uncompiled: a mode that sees operations does not go with it.
    """
    _name_held(run.learner, ledger, run.helpers)
    handles = []

    def hear(phase: str) -> AbstractContextManager[None]:
        if phase == "forward":  # what trains may be another with every step
            ledger.name(run.learner.method.states(), "optimizer state")
            for p in run.learner.method.active().values():
                if not p._post_accumulate_grad_hooks:
                    handles.append(p.register_post_accumulate_grad_hook(lambda p: ledger.name([p.grad], "gradients")))
        return ledger.during(phase)

    with torch.compiler.set_stance("force_eager"), ledger, watching(hear):
        yield
    for handle in handles:
        handle.remove()


def _name_held(learner: Learner, ledger: Ledger, helpers: Mapping[str, Any]) -> None:
    """Tell the ledger of what is held from step to step."""
    for name, p in learner.model.named_parameters():
        ledger.name([p.detach()], "adapter" if "lora_" in name else "weights")
    ledger.name(learner.model.buffers(), "weights")
    ledger.name(learner.method.states(), "optimizer state")
    ledger.name(learner.method.waiting(), "on the host")
    for helper in helpers.values():
        if (model := getattr(helper, "model", None)) is not None:
            ledger.name([*model.parameters(), *model.buffers()], "reference and teacher")
    if learner.method.start:
        ledger.name(learner.method.start.values(), "reference and teacher")


def _kind(device: str) -> str:
    """Of a run's device."""
    if device == "auto":
        return (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    return torch.device(device).type
