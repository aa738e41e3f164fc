"""What a method is: what trains, how a gradient is had, and how it becomes an update.

`step` receives a closure, so a method may call it once per micro-batch (backpropagation) or as often as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.methods.optim import build_optimizer, optimizer_bytes
from tunesmith.phases import phase
from tunesmith.plan.activations import Activations
from tunesmith.tensors import bytes_here, local_part, mapped, mesh_of, room_for
from tunesmith.types import Batch, Memory, Scores, Wanted

Metrics = dict[str, Tensor]
LossFn = Callable[..., tuple[Tensor, Metrics]]
"""(micro-batch) → (loss, metrics); (micro-batch, probes) → (losses [K] in fp64, metrics), without gradient."""
Shapes = Mapping[str, tuple[int, int]]
"""Of parameters by name: (elements, bytes per element)."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite. The parameters have not been touched."""

    step: int = 0
    """Which update, counted from 0; the loop sets it."""


@dataclass(frozen=True)
class Extent:
    """How long a run is, and how much goes through the model at once."""

    steps: int = 1
    """0: nothing is trained or scored; a log of updates is replayed."""
    rows: int = 1
    tokens: int = 1
    """Of a row."""
    accumulates: bool = False
    """Whether an update takes several micro-batches."""
    seed: int = 0
    longest: int = 2
    """Tokens of the longest sample and of what is generated behind it, one at least."""


class GroupLike(Protocol):
    """What a method asks of the ranks that work on one run (`engines/group.py`)."""

    rank: int
    ranks: tuple[int, ...]
    check_every: int

    def gather(self, numbers: Any) -> dict[int, Any]: ...


class EngineLike(Protocol):
    """What a method asks of an engine."""

    device: torch.device
    world: int

    def score(self, model: Any, batch: Batch, wanted: Wanted | None = None) -> Scores: ...

    @property
    def group(self) -> GroupLike: ...

    @property
    def is_apart(self) -> bool: ...

    def micro_batches(self, batch: Batch, tokens: int) -> list[Batch]: ...
    def sum(self, x: Tensor) -> Tensor: ...
    def sums(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def norm(self, grads: Mapping[str, Tensor]) -> Tensor: ...
    def reduce(self, grads: Mapping[str, Tensor]) -> None: ...
    def let_go(self, model: Any) -> None: ...
    def save_model(self, model: Any, folder: Path) -> None: ...
    def save_adapter(self, peft_model: Any, folder: Path, **options: Any) -> None: ...
    def economize(self) -> None: ...
    def held_bytes(self) -> int: ...
    def activations(self, model: Any, rows: int, tokens: int) -> Activations: ...
    def checkpoint_blocks(self, model: Any, on: bool) -> None: ...


class Method:
    """Base of all methods: backpropagation, clipping, one optimizer step. Subclasses choose in `adapt` what trains."""

    requires: ClassVar[frozenset[str]] = frozenset({"autograd"})
    """What the engine must provide."""
    trains_all: ClassVar[bool] = False
    """Whether every parameter of the model trains at some time."""

    def __init__(
        self, config: Any, optimizer_config: Any, max_grad_norm: float | None, extent: Extent = Extent()
    ) -> None:
        self.config = config
        self.optimizer_config = optimizer_config
        self.max_grad_norm = max_grad_norm
        self.extent = extent
        self.start: dict[str, Tensor] | None = None

    @classmethod
    def starts_from_weights(cls, config: Any) -> bool:
        """Whether what `adapt` inserts is computed from the model's weights: then they must be there, whole."""
        return False

    @classmethod
    def needs_fp32_weights(cls, config: Any) -> bool:
        """Whether the updates go to the model's own weights, which bf16 would round at each step; `config`: the method's."""
        return True

    def adapt(self, model: Any) -> None:
        """Choose or insert what trains. Runs before the engine places the model."""
        raise NotImplementedError

    def bind(self, model: nn.Module, engine: EngineLike) -> None:
        """Allocate the optimizer. Runs after the engine has placed the model."""
        self.engine = engine
        self.model = model
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert self.params, "adapt left nothing to train"
        self.optimizer = build_optimizer(self.optimizer_config, self.params, self.lr_multiple)

    def score(self, batch: Batch, wanted: Wanted) -> Scores:
        """What the model says of a batch now, for an evaluation."""
        return self.engine.score(self.model, batch, wanted)

    def micro_batches(self, batch: Batch, tokens: int) -> list[Batch]:
        """What goes through the model here of a whole batch, in pieces that bring at most so many tokens into it."""
        return self.engine.micro_batches(batch, tokens)

    def lr_multiple(self, name: str) -> float:
        """Learning rate of a parameter over that of the schedule."""
        return 1.0

    def step(self, loss_fn: LossFn, micro_batches: Sequence[Batch], lr: float) -> Metrics:
        """One update. Returns `loss`, the objective's metrics and `grad_norm`, all over the global batch.

        Raises NonFiniteError, before anything is changed, when the loss or a gradient is not finite.
        """
        metrics = self.gradient(loss_fn, micro_batches)
        active = self.active()
        if self.engine.world > 1:  # all ranks reduce the same tensors, also where one has no token for an expert
            for p in active.values():
                p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad
        grads = {name: p.grad for name, p in active.items() if p.grad is not None}
        with phase("update"):
            self.engine.reduce(grads)
            metrics["grad_norm"] = norm = self.engine.norm(grads)
            for what in ("loss", "grad_norm"):
                if not torch.isfinite(metrics[what]):
                    raise NonFiniteError(f"{what} is {float(metrics[what])}")
            if self.max_grad_norm is not None and grads:
                scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                parts = [local_part(grad) for grad in grads.values()]
                torch._foreach_mul_(parts, scale.to(parts[0].device))  # the host holds them where weights wait there
            self.update(lr)
        return metrics

    def rehearse(self, loss_fn: LossFn, micro_batches: Sequence[Batch]) -> None:
        """What `step` does before anything changes, beside as much memory as the optimizer will hold."""
        self.ready(several=len(micro_batches) > 1)
        with self.beside_state():
            self.gradient(loss_fn, micro_batches)
        self.drop_gradients()

    @contextmanager
    def beside_state(self) -> Iterator[None]:
        """Inside, memory is taken for the optimizer state that an update of what trains now would make."""
        own = {name: local_part(p.detach()) for name, p in self.active().items()}
        waits = any(p.device != self.engine.device for p in own.values())  # and its state with it
        missing = 0 if waits else max(0, self._state_bytes(own) - bytes_here(self.states()))
        room = torch.zeros(missing, dtype=torch.uint8, device=self.engine.device)
        yield
        del room

    def _state_bytes(self, own: Mapping[str, Tensor]) -> int:
        """Of the optimizer state of what trains now. own: this rank's parts of it."""
        return self.memory({name: (p.numel(), p.element_size()) for name, p in own.items()}).optimizer_bytes

    def unlike_steps(self) -> Iterator[None]:
        """Stands before one after the other of those steps that differ in the memory they take, as they are when training has
        gone on for a while. For a plan: what has been learnt is lost."""
        self._learn_nothing()
        yield

    def _learn_nothing(self) -> None:
        """An update by gradients of 0, from which on there is all the state that the optimizer will keep."""
        for p in self.active().values():
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        with phase("update"):
            self.update(0.0)
        self.drop_gradients()

    def ready(self, several: bool) -> None:
        """Choose what trains at the next step, and how its gradients are kept. several: they are sums over micro-batches."""

    def active(self) -> dict[str, nn.Parameter]:
        """What collects gradients at this step."""
        return self.params

    def drop_gradients(self) -> None:
        """Free what the last step has left."""
        for p in self.active().values():
            p.grad = None

    def update(self, lr: float) -> None:
        """Change the parameters by their gradients."""
        self.optimizer.step(lr)

    def gradient(self, loss_fn: LossFn, micro_batches: Sequence[Batch]) -> Metrics:
        """Sum the micro-batches' gradients into `.grad`."""

        def part(micro_batch: Batch) -> Metrics:
            loss, more = loss_fn(micro_batch)
            if loss.requires_grad:  # not if what trains now has no part in it, as an expert or a tower may not
                with phase("backward"):
                    loss.backward()
            return {"loss": loss.detach(), **more}

        self.drop_gradients()
        return self.total(part(micro_batch) for micro_batch in micro_batches)

    def total(self, parts: Iterable[Metrics]) -> Metrics:
        """What micro-batches say, summed over them and over ranks: the one place where accumulation is written."""
        metrics: Metrics = {}
        for part in parts:
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0) + value
        return self.engine.sums(metrics)

    def keep_start(self) -> None:
        """Keep what `at_start` needs. Runs after `bind` and before any step or loaded state."""
        if self.start is None and self.start_bytes():
            self.start = {name: p.detach().clone() for name, p in self.params.items()}

    def start_bytes(self) -> int:
        """What `keep_start` keeps: a frozen copy of all that trains."""
        return sum(p.numel() * p.element_size() for p in self.params.values())

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Inside, the model is what it was when `bind` ran; for passes without gradient. Needs `keep_start`."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Exchange what trains with its frozen copy. Only pointers move, but for weights whose memory the engine knows."""
        assert self.start is not None, "keep_start has not been called"
        for name, p in self.params.items():
            if mesh_of(p) is None:
                p.data, self.start[name] = self.start[name], p.data
            else:
                ours, kept = local_part(p.detach()), local_part(self.start[name])
                before = ours.clone()
                ours.copy_(kept)
                kept.copy_(before)
        self.engine.let_go(self.model)

    def resolved(self) -> dict[str, Any]:
        """Settings of the method that were found out and not given."""
        return {}

    def describe(self) -> str:
        """What the header says of the method beside its name and how much trains; nothing if empty."""
        return ""

    def memory(self, shapes: Shapes) -> Memory:
        """Bytes held through a step for the trainable parameters."""
        return Memory(
            gradients_bytes=sum(elements * size for elements, size in shapes.values()),
            optimizer_bytes=optimizer_bytes(self.optimizer_config, shapes),
        )

    def states(self) -> list[Tensor]:
        """What is held on the device beside what trains and its gradients."""
        found: list[Tensor] = []
        mapped(self.optimizer.state_dict(), lambda _, x: found.append(x))
        return found

    def waiting(self) -> list[Tensor]:
        """What waits in the host's memory for its turn."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on with the same bits: trained parameters and optimizer state."""
        return {
            "parameters": {name: p.detach() for name, p in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        parameters = saved["parameters"]
        assert parameters.keys() == self.params.keys(), "the checkpoint is of another method or model"
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(parameters[name])
        self.engine.let_go(self.model)
        self.optimizer.load_state_dict(saved["optimizer"])

    def room(self, path: tuple[Any, ...], x: Tensor) -> Tensor:
        """What a tensor of a saved state is read into, before `load_state_dict`: this rank's part of it, and of parameters
        themselves. path: keys and indices that lead to it in the state; x: its shape and type."""
        if path[0] == "parameters" and path[1] in self.params:
            return self.params[path[1]].detach()
        if path[0] == "optimizer" and path[2] in self.params:
            return room_for(x, self.params[path[2]])
        return torch.empty_like(x, device="cpu")

    def keep_log(self, file: Path, about: Mapping[str, Any], at_most: int) -> int | None:
        """For a method whose state is a log of its updates: keep it in this file from now on, and take those that it has beyond
        a checkpoint, up to so many in all. Returns the updates done; None for all other methods."""
        return None

    def save(self, folder: Path) -> None:
        """Write what transformers (or PEFT) loads as is."""
        self.engine.save_model(self.model, folder)


def matching(model: Any, patterns: Sequence[str], setting: str) -> set[int]:
    """Ids of the parameters whose name matches a shell pattern. Raises UserError for a pattern that matches none."""
    # with duplicates: a tied head is found under its own name too
    named = list(model.named_parameters(remove_duplicate=False))
    found = set()
    for pattern in patterns:
        matched = {id(p) for name, p in named if fnmatchcase(name, pattern)}
        if not matched:
            names = ", ".join(name for name, _ in named[:3])
            raise UserError(f"{setting}: {pattern!r} matches no parameter; names look like {names}")
        found |= matched
    return found
