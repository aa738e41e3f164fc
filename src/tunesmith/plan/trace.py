"""A run's parts on tensors without numbers, and one step of it: what is held at each moment, and what is computed.

The step is the run's own: its model, objective, method and data, by the same code. It is that with the largest micro-batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.assemble import Run, assemble
from tunesmith.config import RunConfig
from tunesmith.data.dataset import Dataset, EvaluationBatches
from tunesmith.data.prepare import unwatched
from tunesmith.errors import UserError
from tunesmith.learner import Learner
from tunesmith.methods.noise import quantiles
from tunesmith.models.load import is_multimodal
from tunesmith.phases import phase, watching
from tunesmith.plan.engine import ForeseenEngine
from tunesmith.plan.helpers import foreseen_helpers
from tunesmith.plan.ledger import Ledger, Peak, Peaks, Work, following
from tunesmith.plan.shadow import Shadow
from tunesmith.plan.worst import largest_first, pieces, size, worst_batch
from tunesmith.run_data import RunData
from tunesmith.types import Batch

TRACED = 2
"""Micro-batches of a step that are traced: the largest, and the largest of those that come when there are gradients already."""
ALIKE = 0.02
"""Share of targets by which two micro-batches of one shape may differ for one to tell what both take."""
LOOKED_AT = 8
"""Steps of a run that tell how much padding there is."""


@dataclass(frozen=True)
class Traced(Peaks):
    """One step, and what comes before and after it."""

    peaks: Mapping[str, Peak]
    rows: int
    """Of the largest micro-batch."""
    width: int
    """Tokens of its longest row."""
    work: Work
    """Of the micro-batches that were traced, one or two, on average where steps differ."""
    update: Work
    """Of a step's update. Where a method does not compute gradients it is part of `work`."""
    tokens: int
    """That were traced, padding included."""
    step_tokens: float
    """Of an average step, padding included."""
    parameters: int
    trained: int

    @property
    def flops(self) -> int:
        """Of what was traced. Matrix products, attention and convolutions."""
        return self.work.flops + self.update.flops


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
                batch, held_out, step_tokens = worst_batch(run), held_out_batch(run), tokens_of_step(run)
            held_out = None if held_out is None else first(run, held_out)
            return _trace(run, first(run, batch), held_out, step_tokens)
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


def _trace(run: Run, batch: Batch, held_out: Batch | None, step_tokens: float) -> Traced:
    learner = run.learner
    ledger = Ledger(("on disk", "on the host") if learner.engine.is_apart else ("on disk",))
    work, updates = [], []
    steps = learner.method.unlike_steps()
    with torch.compiler.set_stance("force_eager"):
        next(steps)  # what comes before is no part of a step
    alike = first_of_two_alike(run, batch)
    batch = batch if alike is None else alike
    with recorded(run, ledger, has_gradients=alike is not None), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are of numbers that are not there
        for _ in chain([None], steps):
            before, updated = ledger.work, ledger.updates
            take_step(run, batch, ledger)
            work.append(ledger.work.less(before))
            updates.append(ledger.updates.less(updated))
            if held_out is not None:
                learner.sums(run.objective, [held_out], run.helpers)
        with phase("saving"):
            learner.method.state_dict()
            learner.method.save(Path())
    if run.config.optimizer.name == "adamw8bit":  # runs compiled, without what it makes on the way as it is traced
        ledger.peaks.pop("update", None)
    update = _mean(updates) if "autograd" in learner.method.requires else Work()
    taken = learner.method.micro_batches(batch, learner.micro_batch_tokens)
    rows, width = largest_first(taken)[0].tokens_BT.shape
    return Traced(
        dict(ledger.peaks), rows, width, _mean(work).less(update), update,
        tokens=sum(piece.tokens_BT.numel() for piece in taken), step_tokens=step_tokens,
        parameters=sum(p.numel() for p in learner.model.parameters()),
        trained=sum(p.numel() for p in learner.method.params.values()),
    )  # fmt: skip


def _mean(work: Sequence[Work]) -> Work:
    return Work(*(sum(each) // len(work) for each in zip(*work, strict=True)))


def first_of_two_alike(run: Run, batch: Batch) -> Batch | None:
    """The first of two micro-batches that are alike, where gradients add up in place: what it takes beside gradients that are
    there already is what both take. None where they must be traced one after the other."""
    learner = run.learner
    taken = learner.method.micro_batches(batch, learner.micro_batch_tokens)
    if len(taken) < TRACED or not has_whole_gradients(learner):
        return None
    shapes = {piece.tokens_BT.shape for piece in taken}
    targets = [int((piece.weights_BT != 0).sum()) for piece in taken]
    alike = len(shapes) == 1 and (1 - ALIKE) * targets[0] <= targets[1] <= targets[0]
    return first_alone(learner, batch) if alike else None


def first_alone(learner: Learner, batch: Batch) -> Batch:
    """Of a batch the rows of its first micro-batch."""
    taken = learner.method.micro_batches(batch, learner.micro_batch_tokens)
    return batch.rows(0, len(taken[0].tokens_BT))


def has_whole_gradients(learner: Learner) -> bool:
    """Whether all that trains are parameters of the model, which all get gradients that add up in place."""
    may_have_none = is_multimodal(learner.model.config)  # where a batch holds no image, say
    if may_have_none or "autograd" not in learner.method.requires:
        return False
    own, active = {id(p) for p in learner.model.parameters()}, learner.method.active()
    return active.keys() == learner.method.params.keys() and all(id(p) in own for p in active.values())


def begin_with_gradients(learner: Learner, ledger: Ledger) -> None:
    """As micro-batches before have left them."""
    with ledger.idle():
        for p in learner.method.active().values():
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
            ledger.name([p.grad], "gradients")


def tokens_of_step(run: Run) -> float:
    """Tokens of an average step, padding included, by a few steps from all over the run; of a stream by the first."""
    is_known = isinstance(run.data, Dataset)
    steps = np.linspace(0, run.steps - 1, LOOKED_AT).astype(int) if is_known else [0]
    method, tokens = run.learner.method, run.learner.micro_batch_tokens
    batches = [run.data(step) for step in sorted({int(step) for step in steps})]
    return sum(piece.tokens_BT.numel() for b in batches for piece in method.micro_batches(b, tokens)) / len(batches)


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
def recorded(run: Run, ledger: Ledger, has_gradients: bool = False) -> Iterator[None]:
    """Inside, what the run holds is in the ledger: weights, gradients and optimizer state by name, the rest by phase.
    has_gradients: whether a micro-batch finds those of others.

    What is compiled runs uncompiled: a mode that sees operations does not go with it.
    """
    _name_held(run.learner, ledger, run.helpers)
    handles = []

    def hear(phase: str) -> AbstractContextManager[None]:
        if phase == "forward":  # what trains may be another with every step
            if has_gradients:
                begin_with_gradients(run.learner, ledger)
            ledger.name(run.learner.method.states(), "optimizer state")
            for p in run.learner.method.active().values():
                if not p._post_accumulate_grad_hooks:
                    handles.append(p.register_post_accumulate_grad_hook(lambda p: ledger.name([p.grad], "gradients")))
        return ledger.during(phase)

    try:
        with torch.compiler.set_stance("force_eager"), ledger, following(ledger), watching(hear):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _name_held(learner: Learner, ledger: Ledger, helpers: Mapping[str, Any]) -> None:
    """Tell the ledger of what is held from step to step."""
    for name, p in learner.model.named_parameters():
        ledger.name([p.detach()], _adapter_or(name, "weights"))
    ledger.name(learner.model.buffers(), "weights")
    ledger.name(learner.method.states(), "optimizer state")
    ledger.name(learner.method.waiting(), "on the host")
    for helper in helpers.values():
        if (model := getattr(helper, "model", None)) is not None:
            ledger.name([*model.parameters(), *model.buffers()], "reference and teacher")
    for name, x in (learner.method.start or {}).items():
        ledger.name([x], _adapter_or(name, "reference and teacher"))


def _adapter_or(name: str, kind: str) -> str:
    """What a parameter of this name is for."""
    return "adapter" if "lora_" in name else kind


def _kind(device: str) -> str:
    """Of a run's device."""
    if device == "auto":
        return (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    return torch.device(device).type
