"""Full fine-tuning a chunk at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunesmith.display import short_bytes, short_number
from tunesmith.errors import UserError
from tunesmith.methods.base import EngineLike, LossFn, Method, Metrics, Shapes, matching
from tunesmith.methods.budget import Budget, Fit
from tunesmith.methods.optim import STATE_BYTES_PER_ELEMENT
from tunesmith.methods.partition import Piece, Span, Spans, by_layers, bytes_of, cut, cut_within, elements_of
from tunesmith.methods.shelf import Shelf
from tunesmith.methods.stream import WeightStream
from tunesmith.methods.trainee import Trainee, num_rows
from tunesmith.methods.turns import Turns
from tunesmith.models.load import blocks, head_kind, is_multimodal, value_head
from tunesmith.models.slices import host_modules
from tunesmith.tensors import is_hollow, mesh_of, room_for
from tunesmith.types import Batch, Memory

DEFAULT_CHUNKS = 16
FEW_CHUNKS = 8
"""Up to so many are all looked at by a plan."""
LONGEST_TURN, CYCLES, FEWEST_AFTER_RESET = 100, 8, 8
"""Where no updates_per_chunk is given: at most so many (BAdam's upper bound), and so few that there are some cycles, in which
each chunk meets high and low learning rates; but a chunk that begins without moments needs some updates to gather them."""


class Chunk(Method):
    """Full fine-tuning a chunk at a time (ChunkFT, arXiv 2605.21177; BAdam, 2404.02827; HiFT, 2401.15207; LISA, 2403.17919).

    The parameters are laid end to end and cut into chunks. One chunk trains at a time, for some updates; all others stand
    still, so that gradients, master copies and optimizer state exist for one chunk only. Weights cut in two get the gradient
    of their own rows alone (`models/slices.py`), and nothing below the lowest weight of the chunk keeps activations or goes
    backward. Each slice has its own moments, master copy and count of updates, which wait off the device between its turns.
    Unlike ChunkFT's code, the learning rate follows the step and not the cycle, and the backward pass ends early.
    """

    trains_all: ClassVar[bool] = True

    @classmethod
    def needs_fp32_weights(cls, config: Any) -> bool:
        return False

    def adapt(self, model: Any) -> None:
        if getattr(model, "is_quantized", False) or not all(p.is_floating_point() for p in model.parameters()):
            raise UserError("method: a quantized model cannot be trained in full: use method: lora")
        model.requires_grad_(False)
        self.stream: WeightStream | None = None
        if self.config.weights == "stream":
            if is_multimodal(model.config):
                raise UserError(
                    "method.weights: only a language model's blocks can be streamed: leave weights at resident"
                )
            if not any(
                is_hollow(p) for p in model.parameters()
            ):  # of a plan they are made anew on their way to the device
                self._put_aside(model, torch.accelerator.is_available())

    def _put_aside(self, model: Any, has_accelerator: bool) -> None:
        self.stream = WeightStream([block for _, block in blocks(model)], self._waits_on_disk(has_accelerator))

    def _waits_on_disk(self, has_accelerator: bool) -> bool:
        return self.config.offload == "disk" or (self.config.offload == "auto" and not has_accelerator)

    def bind(self, model: nn.Module, engine: EngineLike) -> None:
        self.engine, self.model = engine, model
        if self.config.weights == "stream" and self.stream is None:
            self._put_aside(model, engine.is_apart)
        frozen = matching(model, self.config.frozen, "method.frozen")
        always = matching(model, self.config.always, "method.always")
        if head_kind(model) != "language":  # it may start at random
            always |= {id(p) for p in value_head(model).parameters()}
        self.params = {name: p for name, p in model.named_parameters() if id(p) not in frozen}
        self.pieces = {name: self._piece(name, p) for name, p in self.params.items()}
        self.always = tuple(Span(name, 0, num_rows(p)) for name, p in self.params.items() if id(p) in always)
        self.blocks = dict(blocks(model))
        self.compiled = {name: block._compiled_call_impl for name, block in self.blocks.items()}  # None where it is not
        self.fit: Fit | None = None
        self.chunks = self._partition([self.pieces[name] for name, p in self.params.items() if id(p) not in always])
        self.turns = self._make_turns(len(self.chunks))
        self.updates = 0
        self.seen: set[int] = set()
        device = next(iter(self.params.values())).device
        on_disk = self._waits_on_disk(engine.is_apart)
        self.shelf = Shelf(device, on_disk, self.config.state == "8bit", comes_ahead=engine.is_apart)
        self.trainees: list[Trainee] = []
        self._turn_to(self.turns.at(0))

    def _piece(self, name: str, p: nn.Parameter) -> Piece:
        is_matrices = p.ndim == 3 and min(p.shape) > 1  # of experts; a convolution along time has a dimension of 1
        can_cut = (p.ndim == 2 or is_matrices) and mesh_of(p) is None and bool(host_modules(self.model, p))
        align = 0 if not can_cut else 1 if is_matrices else self.config.row_alignment
        size = p.element_size()
        has_copy = size < 4
        master = 4 if has_copy and self.config.rounding == "master" else 0
        gradient = 4 if has_copy and self.extent.accumulates else size
        state = STATE_BYTES_PER_ELEMENT[self.optimizer_config.name](self.optimizer_config, name, max(4, size))
        return Piece(name, tuple(p.shape), gradient, master + state, align)

    def _partition(self, pieces: list[Piece]) -> list[Spans]:
        if not pieces:
            raise UserError("method: nothing is left for chunks; train less of it always, or freeze less")
        if self.config.layout == "layers":
            return by_layers(pieces, list(self.blocks))
        if self.config.chunk_bytes is not None:
            return cut_within(pieces, self.config.chunk_bytes, "method.chunk_bytes")
        if self.config.memory is not None:
            self.budget = Budget(self.config.memory, self.model, self.engine, self.extent, self.pieces, self.always)
            self.fit = self.budget.fit(pieces, self.config.num_chunks)
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
        fewest = min(enough, FEWEST_AFTER_RESET if config.state == "reset" else 1)
        turns = replace(
            shortest, updates_per_chunk=config.updates_per_chunk or max(fewest, min(LONGEST_TURN, enough // CYCLES))
        )
        if left_out := num_chunks - len(turns.seen(steps)):
            warnings.warn(
                f"method: with {turns.updates_per_chunk} updates a turn, {left_out} of {num_chunks} chunks will not have "
                f"trained when the run ends after {steps} steps; updates_per_chunk: {enough} and every chunk in method.order "
                "would reach all",
                stacklevel=2,
            )
        return turns

    def step(self, loss_fn: LossFn, micro_batches: Sequence[Batch], lr: float) -> Metrics:
        # of ranks one may have a single micro-batch, and another several
        self.ready(several=len(micro_batches) > 1 or self.engine.world > 1)
        following = self.turns.at(self.updates + 1)
        if following != self.present and (self.fit is None or self.fit.has_room_ahead):
            for chunk in following:
                for span in self.chunks[chunk]:
                    self.shelf.fetch(span.key)
        metrics = super().step(loss_fn, micro_batches, lr)
        self.updates += 1
        metrics["chunk"] = torch.tensor(float(self.present[0]))
        metrics["coverage"] = torch.tensor(self._elements(self.seen) / self._elements(range(len(self.chunks))))
        return metrics

    def rehearse(self, loss_fn: LossFn, micro_batches: Sequence[Batch]) -> None:
        """In all turns that differ in what they take; once something has been learnt in the present one alone."""
        present, seen = self.turns.at(self.updates), self.seen
        begins = range(0, self.extent.steps, self.turns.updates_per_chunk)[: self.turns.per_cycle]
        come = list(dict.fromkeys(map(self.turns.at, begins)))
        for chunks in [present] if self.updates else self._unlike(come):
            self._turn_to(chunks, keep=self.updates > 0)
            self._expect(several=len(micro_batches) > 1 or self.engine.world > 1)
            with self.beside_state():
                self.gradient(loss_fn, micro_batches)
            self.drop_gradients()
        self._turn_to(present, keep=self.updates > 0)
        self.seen = seen | set(present)

    def _state_bytes(self, own: Mapping[str, Tensor]) -> int:
        names = {trainee.span.key: trainee.span.name for trainee in self.trainees}
        return round(sum(p.numel() * self.pieces[names[key]].state_bytes for key, p in own.items()))

    def unlike_steps(self) -> Iterator[None]:
        """Of few chunks all; of many the first, the last, the largest, and those with embeddings and head."""
        cycle, last = self.turns.per_cycle * self.turns.updates_per_chunk, self.turns.updates_per_chunk - 1
        by_chunks = {self.turns.at(update): update for update in range(last, cycle, last + 1)}
        for update in by_chunks.values():
            self.updates = update
            self.ready(several=False)
            self._learn_nothing()
        for chunks in self._unlike(list(by_chunks)):
            self.updates = by_chunks[chunks]
            self.shelf.ahead.clear()  # another follows than was to
            yield

    def _unlike(self, turns: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        if len(turns) <= FEW_CHUNKS:
            return turns
        in_order = sorted(turns, key=min)
        by_size = sorted(turns, key=lambda chunks: sum(bytes_of(self.chunks[n], self.pieces) for n in chunks))
        outside = [
            chunks
            for chunks in turns
            if any(
                not span.name.startswith(tuple(f"{block}." for block in self.blocks))
                for n in chunks
                for span in self.chunks[n]
            )
        ]
        return list(dict.fromkeys([in_order[0], in_order[-1], *by_size[-2:], *outside]))

    def ready(self, several: bool) -> None:
        self._turn_to(self.turns.at(self.updates))
        self._expect(several)

    def _expect(self, several: bool) -> None:
        for trainee in self.trainees:
            trainee.expect(several)

    def active(self) -> dict[str, nn.Parameter]:
        return {trainee.span.key: trainee.leaf for trainee in self.trainees}

    def states(self) -> list[Tensor]:
        present = [x for trainee in self.trainees for x in trainee.state().values()]
        return present + [x for state, _ in self.shelf.ahead.values() for x in state.values()]

    def waiting(self) -> list[Tensor]:
        return self.shelf.in_memory() + ([] if self.stream is None else self.stream.in_memory())

    def update(self, lr: float) -> None:
        for trainee in self.trainees:
            trainee.update(lr)

    present: tuple[int, ...] = ()
    """The chunks whose turn it is."""

    def _turn_to(self, wanted: tuple[int, ...], keep: bool = True) -> None:
        """End one chunk's turn and begin another's. keep: what has been learnt in that which ends."""
        if wanted == self.present:
            return
        staying = [trainee for trainee in self.trainees if trainee.span in self.always]
        for trainee in self.trainees:
            if trainee not in staying:
                trainee.stop()
                if keep and self.config.state != "reset" and (state := trainee.state()):
                    self.shelf.put(trainee.span.key, state)
        self.trainees = staying  # the old state is free before the new one comes
        self._begin(wanted)

    def _begin(self, wanted: tuple[int, ...]) -> None:
        self.present, self.seen = wanted, self.seen | set(wanted)
        self.engine.let_go(self.model)  # what is gathered already would not learn that it trains from now on
        spans = [*(span for chunk in wanted for span in self.chunks[chunk]), *self.always]
        if self.stream is not None:
            held = self._blocks_of(spans)
            outside = any(not span.name.startswith(tuple(f"{block}." for block in self.blocks)) for span in spans)
            self.stream.hold(held, self.shelf.device, below=outside)
        if self.fit is not None:
            self.engine.checkpoint_blocks(self.model, any(self.fit.checkpointing[chunk] for chunk in wanted))
        begun = {trainee.span: trainee for trainee in self.trainees}
        self.trainees = [begun.get(span) or self._trainee(span) for span in spans]
        self._choose_compiled()

    def _trainee(self, span: Span) -> Trainee:
        state = self.shelf.get(span.key) or {}
        stochastic = self.config.rounding == "stochastic"
        return Trainee(self.model, self.params[span.name], span, state, self.optimizer_config, stochastic)

    def _blocks_of(self, spans: Sequence[Span]) -> list[int]:
        """Numbers of the blocks in which these train."""
        return [n for n, block in enumerate(self.blocks) if any(span.name.startswith(block + ".") for span in spans)]

    def _choose_compiled(self) -> None:
        """Blocks in which a chunk begins or ends run uncompiled: else each border would be compiled anew."""
        whole = {id(trainee.leaf) for trainee in self.trainees}
        names = {trainee.span.name for trainee in self.trainees if trainee.span not in self.always}
        for name, block in self.blocks.items():
            if self.compiled[name] is not None:
                own = dict(block.named_parameters())
                in_part = any(f"{name}.{n}" in names for n in own) and not all(id(p) in whole for p in own.values())
                block._compiled_call_impl = None if in_part else self.compiled[name]

    def _elements(self, chunks: Any) -> int:
        return sum(elements_of(self.chunks[chunk], self.pieces) for chunk in chunks)

    def resolved(self) -> dict[str, Any]:
        found = {"updates_per_chunk": self.turns.updates_per_chunk}
        return found if self.fit is None else {**found, "num_chunks": len(self.chunks)}

    def describe(self) -> str:
        largest = max(elements_of(spans, self.pieces) for spans in self.chunks)
        return (
            f"{len(self.chunks)} chunks of up to {short_number(largest)} parameters, {self.turns.num_active} at a time for "
            f"{self.turns.updates_per_chunk} updates, all after {self.turns.updates_per_chunk * self.turns.per_cycle}"
        ) + (f"; {short_bytes(self.fit.peak_bytes)} expected at the peak" if self.fit else "")

    def memory(self, shapes: Shapes) -> Memory:
        largest = sorted(self.chunks, key=lambda spans: bytes_of(spans, self.pieces))[-self.turns.num_active :]
        spans = (*(span for chunk in largest for span in chunk), *self.always)
        gradients = sum(elements_of((span,), self.pieces) * self.pieces[span.name].gradient_bytes for span in spans)
        return Memory(gradients, round(bytes_of(spans, self.pieces)) - gradients)

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
        if (
            self.fit is not None
            and self.start is None
            and self.fit.peak_bytes + self.start_bytes() > self.config.memory
        ):
            raise UserError(
                f"method.memory: the frozen copy of the model that this objective's reference needs takes "
                f"{short_bytes(self.start_bytes())} more: give {short_bytes(self.fit.peak_bytes + self.start_bytes())} and "
                f"method.num_chunks: {len(self.chunks)}, or set objective.reference to precompute"
            )
        super().keep_start()

    def state_dict(self) -> dict[str, Any]:
        states = self.shelf.state_dict() | {trainee.span.key: trainee.state() for trainee in self.trainees}
        with self._readable():
            parameters = {name: p.detach() for name, p in self.params.items()}
        return {"parameters": parameters, "updates": self.updates, "partition": self._signature(), "states": states}

    def room(self, path: tuple[Any, ...], x: Tensor) -> Tensor:
        name = str(path[1]).rpartition("[")[0]
        if path[0] == "states" and name in self.params:  # they wait for their turn
            return room_for(x, self.params[name], device="cpu")
        return super().room(path, x)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if saved["partition"] != self._signature():
            raise UserError(
                "method: the checkpoint was made with other chunks, whose optimizer states do not fit these; put back what "
                "method.num_chunks, chunk_bytes, memory, row_alignment, always and frozen were, and one rank or several, since "
                "weights are cut inside on one rank alone (method.layout: layers is the same on all); or start a new run"
            )
        for trainee in self.trainees:
            trainee.stop()
        with self._readable(), torch.no_grad():
            for name, p in self.params.items():
                p.copy_(saved["parameters"][name])
        self.engine.let_go(self.model)
        self.trainees, self.updates = [], saved["updates"]
        self.shelf.load_state_dict(saved["states"])
        self.seen = self.turns.seen(self.updates)
        self._begin(self.turns.at(max(0, self.updates - 1)))  # whose state the checkpoint holds; `step` goes on
        if self.config.state == "reset":
            self.shelf.load_state_dict({})

    def _signature(self) -> list[list[list[Any]]]:
        return [[[span.name, span.start, span.stop] for span in spans] for spans in (self.always, *self.chunks)]
