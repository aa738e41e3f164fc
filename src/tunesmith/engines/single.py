"""One device: places the model, runs it, reduces over the ranks there are (one)."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil
import torch
from torch import Tensor

from tunesmith.config import ModelConfig, RunConfig
from tunesmith.engines.checkpoint import Room, load_newest, save_checkpoint
from tunesmith.engines.group import Group
from tunesmith.errors import UserError
from tunesmith.models.head import Head
from tunesmith.models.load import HeadKind, blocks, load_model
from tunesmith.models.probe import find_head
from tunesmith.models.save import can_save_by_tensor, save_sharded
from tunesmith.models.score import ALL, Columns, hidden_of_targets, score
from tunesmith.plan.activations import Activations, measure
from tunesmith.types import Batch, Scores, Wanted

Found = TypeVar("Found")


class SingleEngine:
    """Everything on one device."""

    provides: ClassVar[frozenset[str]] = frozenset({"autograd", "probes"})
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "choices", "values", "router", "embeddings", "generated"})
    """Parts of Scores beyond log-probabilities that `score` can give."""
    compiles_dynamic = True
    """Whether compiled blocks take batches of all shapes; else each shape is compiled anew."""
    rank, world = 0, 1
    """Of those among whom tensors are summed."""
    has_whole_rows = True
    """Whether all columns of a row go through the model on one rank."""
    group_kind: ClassVar[type[Group]] = Group

    def __init__(self, config: Any, precision: str, needs_fp32_weights: bool = False) -> None:
        self.config = config
        self.group: Group = Group()
        self.device = find_device(config.device)
        self.precision = find_precision(precision, self.device, needs_fp32_weights)
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def is_apart(self) -> bool:
        """Whether the device has memory of its own, and what waits in the host's takes nothing of it."""
        return self.device.type != "cpu"

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raises UserError for what this engine cannot run, before anything is loaded."""

    def load(
        self, config: ModelConfig, dtype: torch.dtype, head: HeadKind = "language", num_labels: int = 0,
        needs_weights: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        """(the model, on the CPU or still without its weights; a model that answers the probes as it would).

        needs_weights: that a method's adapters start from weights. Raises UserError.
        """
        model = load_model(config, dtype, head, num_labels)
        return model, model

    def adapting(self, model: Any) -> AbstractContextManager[None]:
        """Inside, a method may put adapters into a model that has just been loaded."""
        return nullcontext()

    def place(self, model: Any) -> Any:
        """Move to the device, learn the head's rule, and apply checkpointing and compilation, in this order."""
        self._move(model)
        model.eval()  # PEFT's new layers start in training mode: the probe compares two passes
        # under mixed precision it is asked in fp32: rounding to bf16 would hide the rule from weights held to fp32's tolerance
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"), torch.no_grad():
            self.head = self._head_of(model)
        self.checkpoint_blocks(model, self.config.activation_checkpointing)
        if self.config.compile:
            for _, block in blocks(model):
                block.compile(dynamic=self.compiles_dynamic)
        return model

    def _head_of(self, model: Any) -> Head:
        return find_head(model)

    def _move(self, model: Any) -> None:
        """To the device; weights without storage are those that a method brings itself."""
        for p in model.parameters():
            if p.untyped_storage().nbytes() or not p.numel():
                p.data = p.data.to(self.device)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def another(self) -> SingleEngine:
        """One of the same kind for a second model beside the run's, which does not train."""
        return type(self)(self.config.model_copy(update={"activation_checkpointing": False}), self.precision)

    def checkpoint_blocks(self, model: Any, on: bool) -> None:
        """Whether blocks are computed again in the backward pass."""
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()  # else the backward pass runs down to the embeddings whatever trains
        elif model.is_gradient_checkpointing:
            model.gradient_checkpointing_disable()

    def activations(self, model: Any, rows: int, tokens: int) -> Activations:
        """What a micro-batch of so many rows and tokens takes in the model."""
        return self._run(model, lambda: measure(model, self.head, rows, tokens))

    def score(self, model: Any, batch: Batch, wanted: Wanted | None = None) -> Scores:
        """Log-probabilities of the batch's targets, and what else is wanted."""
        return self._run(model, lambda: score(model, self.head, batch, wanted, self.columns(batch)))

    def hidden(self, model: Any, batch: Batch) -> Tensor:
        """Hidden states from which the batch's targets are predicted, [N, D], row by row."""
        return self._run(model, lambda: hidden_of_targets(model, self.head, batch, self.columns(batch)))

    def columns(self, batch: Batch) -> Columns:
        """What of the batch's rows goes through the model here."""
        return ALL

    def _run(self, model: Any, compute: Callable[[], Found]) -> Found:
        """What `compute` says, which calls the model."""
        with self._autocast():
            return compute()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision in ("mixed", "bf16"))

    def seed(self, seed: int, step: int) -> None:
        """Start the random streams of a step (dropout). They depend on seed and step alone, so no state is saved."""
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        return x

    def sums(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of several small tensors by name, which all ranks have, in one exchange."""
        return dict(numbers)

    def reduce(self, grads: Mapping[str, Tensor]) -> None:
        """Sum gradients over ranks, in place."""

    def norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Euclidean norm of all gradients together, over ranks."""
        return torch.nn.utils.get_total_norm(list(grads.values())) if grads else torch.zeros((), device=self.device)

    def rows(self, batch: Batch) -> slice:
        """This rank's part of a batch."""
        return slice(0, len(batch.tokens_BT))

    def micro_batches(self, batch: Batch, tokens: int) -> list[Batch]:
        """This rank's part of a batch in pieces of at most so many tokens. All ranks have as many of them: some, at the end,
        may be empty."""
        return batch.split(tokens)

    def save_checkpoint(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
        """As `engines/checkpoint.py` says, in any thread; where ranks hold parts of the state, all of them call this."""
        save_checkpoint(folder, step, state, keep)

    def load_checkpoint(
        self, folder: Path, warn: Callable[[str], None], room: Room
    ) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest whole checkpoint, of which a rank reads its part; None if there is none."""
        return load_newest(folder, warn, room)

    def let_go(self, model: Any) -> None:
        """Forget what has been gathered of weights that other ranks hold, since they have changed."""

    def save_model(self, model: Any, folder: Path) -> None:
        """Write what transformers loads as is, a tensor at a time. Where ranks hold parts of it, all of them call this."""
        if can_save_by_tensor(model):
            save_sharded(model, folder, rank=0, world=1)
        else:
            model.save_pretrained(folder)

    def save_adapter(self, peft_model: Any, folder: Path, **options: Any) -> None:
        """The same of what PEFT loads. options: of its `save_pretrained`."""
        peft_model.save_pretrained(folder, **options)

    def memory_bytes(self) -> int:
        """Peak of the accelerator's allocator; on the CPU what the process holds, which never falls (`keep_freed_memory`)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return own_memory()

    def economize(self) -> None:
        """From now on hold no more memory than is in use."""
        if self.device.type == "cpu":
            return_freed_memory()

    def held_bytes(self) -> int:
        """What is allocated on the accelerator now, or held by the process."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return own_memory()


def own_memory() -> int:
    """Resident memory of this process without mapped files, which the kernel can drop when memory is short."""
    held = psutil.Process().memory_info()
    return held.rss - getattr(held, "shared", 0)


def keep_freed_memory(up_to_bytes: int | None = None) -> None:
    """Let glibc keep large freed blocks (up to 32 MiB at most, or all) instead of giving them back to the kernel and faulting
    them in again.

    Every step frees and takes the same activations and logits. Affects this process alone; no effect without glibc.
    """
    if up_to_bytes is None:
        _mallopt(mmap_max=0, trim_threshold=2**31 - 1)
    else:
        _mallopt(mmap_max=2**20, mmap_threshold=up_to_bytes, trim_threshold=2**31 - 1)


def return_freed_memory() -> None:
    """The opposite, and stricter than glibc's own way: blocks from 256 KiB on are the kernel's again once they are free.

    Slower by the faults, but without gaps: what the process holds is what it uses.
    """
    _mallopt(mmap_max=2**20, mmap_threshold=2**18, trim_threshold=2**20)


MALLOC_OPTIONS = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}
"""Numbers of malloc.h."""


def _mallopt(**options: int) -> None:
    import ctypes

    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for name, value in options.items():
            libc.mallopt(MALLOC_OPTIONS[name], value)
        libc.malloc_trim(0)


def find_device(name: str) -> torch.device:
    """The device, or for auto the accelerator that torch finds, else the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"engine.device: {name!r} is not here: {str(error).splitlines()[0]}; try auto or cpu"
        ) from error
    return device


def find_precision(name: str, device: torch.device, needs_fp32_weights: bool) -> str:
    """fp32, bf16 or mixed. auto: bf16 where the device multiplies it faster, and then mixed if the weights train.

    Measured, not looked up: processors differ (AMX, AVX-512 BF16, emulation) more than their names tell.
    """
    if name != "auto":
        return name
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _bf16_is_faster(device)
    if not fast:
        return "fp32"
    return "mixed" if needs_fp32_weights else "bf16"


def _bf16_is_faster(device: torch.device) -> bool:
    from time import perf_counter

    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
        seconds = []
        for _ in range(5):
            start = perf_counter()
            (a @ b).sum().item()
            seconds.append(perf_counter() - start)
        best[dtype] = min(seconds)
    return best[torch.bfloat16] < 0.75 * best[torch.float32]
