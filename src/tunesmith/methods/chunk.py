"""Full fine-tuning a chunk at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tunesmith.display import short_bytes, short_number
from tunesmith.errors import UserError
from tunesmith.methods.base import EngineLike, LossFn, Method, Metrics, Shapes, matching
from tunesmith.methods.budget import Budget, Fit
from tunesmith.methods.optim import STATE_BYTES_PER_ELEMENT, Optimizer, build_optimizer
from tunesmith.methods.partition import Piece, Span, cut, cut_within
from tunesmith.methods.shelf import Shelf
from tunesmith.methods.stream import WeightStream
from tunesmith.methods.turns import Turns
from tunesmith.models.load import blocks, head_kind, is_multimodal, value_head
from tunesmith.models.slices import host_modules, train_rows
from tunesmith.types import Batch, Memory

DEFAULT_CHUNKS = 16
LONGEST_TURN, CYCLES = 100, 8
"""Where no updates_per_chunk is given: at most so many (BAdam's upper bound), and so few that there are some cycles, in which
each chunk meets high and low learning rates."""


@dataclass
class Trainee:
    """Rows of a parameter whose turn it is."""

    span: Span
    leaf: nn.Parameter
    """Collects the gradient: the parameter itself, or rows that share its memory."""
    master: nn.Parameter
    """What the optimizer changes: the leaf, or an fp32 copy of it."""
    optimizer: Optimizer
    stop: Callable[[], None]
    """Ends the collecting."""

    @property
    def key(self) -> str:
        return _key(self.span)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state for these rows, and the master copy."""
        state = dict(self.optimizer.parts[0].state.get(self.master, {}))
        if self.master is not self.leaf and self.master.numel():
            state["master"] = self.master.detach()
        return state


class Chunk(Method):
    """Full fine-tuning a chunk at a time (ChunkFT, arXiv 2605.21177; BAdam, 2404.02827; HiFT, 2401.15207; LISA, 2403.17919).

    The parameters are laid end to end and cut into chunks. One chunk trains at a time, for some updates; all others stand
    still, so that gradients, master copies and optimizer state exist for one chunk only. Weights cut in two get the gradient
    of their own rows alone (`models/slices.py`), and nothing below the lowest weight of the chunk keeps activations or goes
    backward. Each slice has its own moments, master copy and count of updates, which wait off the device between its turns.
    Unlike ChunkFT's code, the learning rate follows the step and not the cycle, and the backward pass ends early.
    """

    trains_all: ClassVar[bool] = True
    needs_fp32_weights: ClassVar[bool] = False

    def adapt(self, model: Any) -> None:
        if getattr(model, "is_quantized", False) or not all(p.is_floating_point() for p in model.parameters()):
            raise UserError("method: a quantized model cannot be trained in full: use method: lora")
        model.requires_grad_(False)
        self.stream: WeightStream | None = None
        if self.config.weights == "stream":
            if is_multimodal(model.config):
                raise UserError(
                    "method.weights: only the language model's blocks can be streamed: leave weights at resident"
                )
            self.stream = WeightStream([block for _, block in blocks(model)], on_disk=self._waits_on_disk())

    def _waits_on_disk(self) -> bool:
        return self.config.offload == "disk" or (self.config.offload == "auto" and not torch.accelerator.is_available())

    def bind(self, model: nn.Module, engine: EngineLike) -> None:
        self.engine, self.model = engine, model
        frozen = matching(model, self.config.frozen, "method.frozen")
        always = matching(model, self.config.always, "method.always")
        if head_kind(model) != "language":  # it may start at random
            always |= {id(p) for p in value_head(model).parameters()}
        self.params = {name: p for name, p in model.named_parameters() if id(p) not in frozen}
        self.pieces = {name: self._piece(name, p) for name, p in self.params.items() if id(p) not in always}
        if not self.pieces:
            raise UserError("method: nothing is left for chunks; train less of it always, or freeze less")
        self.blocks = dict(blocks(model))
        self.compiled = {name: block._compiled_call_impl for name, block in self.blocks.items()}  # None where it is not
        self.fit: Fit | None = None
        self.chunks = self._partition(list(self.pieces.values()))
        self.turns = self._make_turns(len(self.chunks))
        self.updates = 0
        device = next(iter(self.params.values())).device
        self.shelf = Shelf(device, self._waits_on_disk(), self.config.state == "8bit")
        self.present: tuple[int, ...] = ()
        self.trainees: list[Trainee] = []
        self.constant = [self._begin(Span(n, 0, _rows(p))) for n, p in self.params.items() if id(p) in always]
        self._turn_to(self.turns.at(0))

    def _piece(self, name: str, p: nn.Parameter) -> Piece:
        is_matrices = p.ndim == 3 and min(p.shape) > 1  # of experts; a convolution along time has a dimension of 1
        can_cut = (p.ndim == 2 or is_matrices) and bool(host_modules(self.model, p))
        align = 0 if not can_cut else 1 if is_matrices else self.config.row_alignment
        return Piece(name, tuple(p.shape), self._bytes_per_element(name, p.element_size()) * prod(p.shape[1:]), align)

    def _bytes_per_element(self, name: str, size: int) -> float:
        """Gradient, master copy and optimizer state of one number that trains."""
        master = 4 if size < 4 and self.config.rounding == "master" else 0
        return (
            size
            + master
            + STATE_BYTES_PER_ELEMENT[self.optimizer_config.name](self.optimizer_config, name, max(4, size))
        )

    def _partition(self, pieces: list[Piece]) -> list[tuple[Span, ...]]:
        if self.config.layout == "layers":
            return _by_layers(pieces, [name for name, _ in blocks(self.model)])
        if self.config.chunk_bytes is not None:
            return cut_within(pieces, self.config.chunk_bytes, "method.chunk_bytes")
        if self.config.memory is not None:
            always = sum(
                self._bytes_per_element(name, p.element_size()) * p.numel()
                for name, p in self.params.items()
                if name not in self.pieces
            )
            budget = Budget(self.config.memory, self.model, self.engine, self.extent, always)
            self.fit = budget.fit(pieces, self.config.num_chunks)
            return self.fit.chunks
        return cut(pieces, self.config.num_chunks or DEFAULT_CHUNKS)

    def _make_turns(self, num_chunks: int) -> Turns:
        config, steps = self.config, self.extent.steps
        if config.num_active > num_chunks:
            raise UserError(f"method.num_active: {config.num_active}, but there are {num_chunks} chunks")
        if isinstance(config.order, tuple) and (not config.order or max(config.order) >= num_chunks):
            raise UserError(
                f"method.order: name chunks by numbers from 0 to {num_chunks - 1}; got {list(config.order)}"
            )
        shortest = Turns(num_chunks, config.num_active, config.order, 1, self.extent.seed)
        if shortest.per_cycle > steps:
            raise UserError(
                f"method: {num_chunks} chunks need {shortest.per_cycle} updates for a turn each, but the run has {steps}: "
                "raise train.steps or train.epochs, or make fewer chunks (method.num_chunks, memory or chunk_bytes)"
            )
        enough = steps // shortest.per_cycle
        turns = replace(
            shortest, updates_per_chunk=config.updates_per_chunk or max(1, min(LONGEST_TURN, enough // CYCLES))
        )
        if turns.updates_per_chunk > enough:
            warnings.warn(
                f"method.updates_per_chunk: with {turns.updates_per_chunk} updates each, "
                f"{num_chunks - len(turns.seen(steps))} of {num_chunks} chunks will not have trained when the run ends after "
                f"{steps} steps; {enough} would reach all",
                stacklevel=2,
            )
        return turns

    def step(self, loss_fn: LossFn, micro_batches: Sequence[Batch], lr: float) -> Metrics:
        self._turn_to(self.turns.at(self.updates))
        for trainee in self.trainees + self.constant:
            if trainee.master is not trainee.leaf:  # a sum of many bf16 gradients is no bf16 number
                trainee.leaf.grad = None
                trainee.leaf.grad_dtype = torch.float32 if len(micro_batches) > 1 else trainee.leaf.dtype
        metrics = super().step(loss_fn, micro_batches, lr)
        self.updates += 1
        if (following := self.turns.at(self.updates)) != self.present:
            for chunk in following:
                for span in self.chunks[chunk]:
                    self.shelf.fetch(_key(span))
        metrics["chunk"] = torch.tensor(float(self.present[0]))
        metrics["coverage"] = torch.tensor(self._coverage())
        return metrics

    def active(self) -> dict[str, nn.Parameter]:
        return {trainee.key: trainee.leaf for trainee in self.trainees + self.constant}

    def update(self, lr: float) -> None:
        for trainee in self.trainees + self.constant:
            if trainee.leaf.grad is None:
                continue
            if trainee.master is not trainee.leaf:
                if self.config.rounding == "stochastic":
                    trainee.master.data = trainee.leaf.detach().float()
                trainee.master.grad = trainee.leaf.grad.float()
                trainee.leaf.grad = None
            trainee.optimizer.step(lr)
            if trainee.master is not trainee.leaf:
                trainee.master.grad = None
                with torch.no_grad():
                    if self.config.rounding == "stochastic":
                        trainee.leaf.copy_(stochastic_bf16(trainee.master.detach()))
                        trainee.master.data = trainee.master.data.new_empty(0)
                    else:
                        trainee.leaf.copy_(trainee.master)

    def _turn_to(self, wanted: tuple[int, ...]) -> None:
        """End one chunk's turn and begin another's."""
        if wanted == self.present:
            return
        for trainee in self.trainees:
            trainee.stop()
            if self.config.state != "reset" and (state := trainee.state()):
                self.shelf.put(trainee.key, state)
        self.trainees = []  # the old state is free before the new one comes
        self.present = wanted
        if self.stream is not None:
            names = {span.name for chunk in wanted for span in self.chunks[chunk]} | (
                self.params.keys() - self.pieces.keys()
            )
            active = (n for n, block in enumerate(self.blocks) if any(name.startswith(block + ".") for name in names))
            self.stream.hold(active, self.shelf.device)
        if self.fit is not None:
            self.engine.checkpoint_blocks(self.model, any(self.fit.checkpointing[chunk] for chunk in wanted))
        self.trainees = [self._begin(span) for chunk in wanted for span in self.chunks[chunk]]
        self._choose_compiled()

    def _choose_compiled(self) -> None:
        """Blocks that train in part run uncompiled: else each border of a chunk would be compiled anew."""
        whole = {id(trainee.leaf) for trainee in self.trainees + self.constant}
        names = {trainee.span.name for trainee in self.trainees + self.constant}
        for name, block in self.blocks.items():
            if self.compiled[name] is not None:
                trained = [id(p) in whole for own, p in block.named_parameters()]
                in_part = any(f"{name}.{own}" in names for own, _ in block.named_parameters()) and not all(trained)
                block._compiled_call_impl = None if in_part else self.compiled[name]

    def _begin(self, span: Span) -> Trainee:
        p = self.params[span.name]
        if span.stop - span.start == _rows(p):
            p.requires_grad_(True)
            leaf, stop = p, cast(Callable[[], None], partial(_stand_still, p))
        else:
            leaf, stop = train_rows(self.model, p, span.start, span.stop)
        master: Any = leaf
        state = self.shelf.get(_key(span)) or {}
        if leaf.element_size() < 4:
            kept = state.pop("master", None)
            master = nn.Parameter(leaf.detach().float() if kept is None else kept)
        optimizer = build_optimizer(self.optimizer_config, {span.name: master}, self.lr_multiple)
        if state:
            optimizer.parts[0].state[master] = state
        if master is not leaf and self.config.rounding == "stochastic":
            master.data = master.data.new_empty(0)  # made anew for each update
        return Trainee(span, leaf, master, optimizer, stop)

    def _coverage(self) -> float:
        """Share of what trains that has had a turn."""
        seen = sum(
            _elements(span, self.pieces) for chunk in self.turns.seen(self.updates) for span in self.chunks[chunk]
        )
        return seen / sum(prod(piece.shape) for piece in self.pieces.values())

    def resolved(self) -> dict[str, Any]:
        return {} if self.fit is None else {"num_chunks": len(self.chunks)}

    def describe(self) -> str:
        largest = max(sum(_elements(span, self.pieces) for span in chunk) for chunk in self.chunks)
        return (
            f"{len(self.chunks)} chunks of up to {short_number(largest)} parameters, {self.turns.num_active} at a time for "
            f"{self.turns.updates_per_chunk} updates, all after {self.turns.updates_per_chunk * self.turns.per_cycle}"
        ) + (f"; {short_bytes(self.fit.peak_bytes)} expected at the peak" if self.fit else "")

    def memory(self, shapes: Shapes) -> Memory:
        by_bytes = sorted(
            (
                (
                    sum(_elements(span, self.pieces) * self.params[span.name].element_size() for span in chunk),
                    sum((span.stop - span.start) * self.pieces[span.name].row_bytes for span in chunk),
                )
                for chunk in self.chunks
            ),
            key=lambda pair: pair[1],
        )[-self.turns.num_active :]
        for trainee in self.constant:
            size = trainee.leaf.numel() * trainee.leaf.element_size()
            by_bytes.append(
                (size, trainee.leaf.numel() * self._bytes_per_element(trainee.span.name, trainee.leaf.element_size()))
            )
        gradients = sum(gradient for gradient, _ in by_bytes)
        return Memory(gradients, round(sum(total for _, total in by_bytes)) - gradients)

    def _readable(self) -> AbstractContextManager[None]:
        """Inside, all weights can be read and loaded."""
        return nullcontext() if self.stream is None else self.stream.aside()

    def save(self, folder: Path) -> None:
        with self._readable():
            super().save(folder)

    def keep_start(self) -> None:
        if self.stream is not None:
            raise UserError(
                "method.weights: stream keeps no second copy of the model, which this objective's reference needs: set "
                "objective.reference to precompute, or name another model as objective.reference_model"
            )
        super().keep_start()

    def state_dict(self) -> dict[str, Any]:
        states = self.shelf.state_dict()
        for trainee in self.trainees + self.constant:
            states[trainee.key] = trainee.state()
        with self._readable():
            parameters = {name: p.detach() for name, p in self.params.items()}
        return {
            "parameters": parameters,
            "updates": self.updates,
            "partition": self._signature(),
            "states": states,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if saved["partition"] != self._signature():
            raise UserError(
                "method: the checkpoint was made with other chunks, whose optimizer states do not fit these; put back what "
                "method.num_chunks, chunk_bytes, memory, row_alignment, always and frozen were, or start a new run"
            )
        with self._readable(), torch.no_grad():
            for name, p in self.params.items():
                p.copy_(saved["parameters"][name])
        for trainee in self.trainees + self.constant:
            trainee.stop()
        self.updates = saved["updates"]
        self.shelf.load_state_dict(saved["states"])
        self.constant = [self._begin(trainee.span) for trainee in self.constant]
        self.trainees, self.present = [], ()
        self._turn_to(self.turns.at(max(0, self.updates - 1)))  # whose state the checkpoint holds; `step` goes on
        if self.config.state == "reset":
            self.shelf.load_state_dict({})

    def _signature(self) -> list[list[list[Any]]]:
        return [[[span.name, span.start, span.stop] for span in chunk] for chunk in self.chunks]


def stochastic_bf16(x: Tensor) -> Tensor:
    """fp32 rounded to one of the two nearest bf16 numbers at random, in proportion to how near: right on average."""
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device)
    return (x.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


def _rows(p: Tensor) -> int:
    return len(p) if p.ndim else 1


def _stand_still(p: nn.Parameter) -> None:
    p.requires_grad_(False)
    p.grad = None


def _key(span: Span) -> str:
    return f"{span.name}[{span.start}:{span.stop}]"


def _elements(span: Span, pieces: Mapping[str, Piece]) -> int:
    return (span.stop - span.start) * prod(pieces[span.name].shape[1:])


def _by_layers(pieces: Sequence[Piece], block_names: Sequence[str]) -> list[tuple[Span, ...]]:
    """A chunk of each block, and of each run of parameters outside of blocks."""

    def block_of(name: str) -> str | None:
        return next((block for block in block_names if name.startswith(block + ".")), None)

    return [
        tuple(Span(piece.name, 0, piece.rows) for piece in run)
        for _, run in groupby(pieces, key=lambda piece: block_of(piece.name))
    ]
