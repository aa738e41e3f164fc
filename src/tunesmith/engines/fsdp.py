"""One model over many devices: a mesh of ranks that share out batches, weights and the inside of layers.

Ranks stand in a mesh of replicate × shard × context × tensor, each of one rank or more. Those that differ in the first two
train on different parts of a batch; weights are cut over shard and context together (FSDP2; with several replicas hybrid
sharding), and inside layers over tensor. Losses are divided by the count of the whole batch, so gradients are sums over ranks
and never means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import register_dataclass

from tunesmith.config import ModelConfig, RunConfig
from tunesmith.engines.checkpoint import Room
from tunesmith.engines.collective import Collective
from tunesmith.engines.context import ContextParallel, Cut
from tunesmith.engines.context_check import check_architecture, check_cut
from tunesmith.engines.group import Group
from tunesmith.engines.parts import load_parts, save_parts
from tunesmith.engines.place import place
from tunesmith.engines.single import SingleEngine, keep_freed_memory
from tunesmith.engines.tensor_parallel import check_replicated, check_tensor_parallel, tensor_parallel
from tunesmith.errors import UserError
from tunesmith.models.head import Head
from tunesmith.models.load import HeadKind, blocks, is_multimodal, load_config
from tunesmith.models.probe import find_head_by
from tunesmith.models.save import save_adapter, save_sharded
from tunesmith.models.score import ALL, Columns
from tunesmith.models.sharded import Checkpoint, empty_model, why_whole
from tunesmith.models.sibling import sibling
from tunesmith.plan.activations import Activations
from tunesmith.tensors import local_part
from tunesmith.types import Batch, Scores

PRECISIONS = ("mixed", "bf16", "fp32")
"""What one rank cannot do fast, none does."""

KEPT_BYTES = 2**25
"""On the CPU, larger blocks go back to the kernel when they are free: gathered weights of many sizes would leave gaps between
them that nothing fits into."""

Found = TypeVar("Found")

register_dataclass(Scores, field_names=list(Scores.__dataclass_fields__), drop_field_names=[])
"""So that FSDP sees the tensors in them, whose backward pass begins the gathering of weights."""


class FsdpEngine(SingleEngine):
    """Every rank holds a part of the model, and gathers a block's weights while it computes with them."""

    provides: ClassVar[frozenset[str]] = frozenset({"autograd"})
    reads: ClassVar[frozenset[str]] = SingleEngine.reads - {"generated"}
    group_kind: ClassVar[type[Group]] = Collective
    checkpoint: Checkpoint | None = None
    """Of a model that has been loaded without its weights, until they are read."""
    partial: frozenset[str] = frozenset()
    """Parameters to whose gradients each of the ranks along `tensor` adds."""
    has_checked = False
    """Whether gradients of weights that are whole on these ranks have been compared."""

    def __init__(self, config: Any, precision: str, needs_fp32_weights: bool = False) -> None:
        super().__init__(config, precision, needs_fp32_weights)
        here = place()
        if self.device.type != "cpu" and self.device.index is None:
            number = torch.accelerator.device_count()
            if here.local_rank >= number:
                raise UserError(
                    f"rank {here.rank} is number {here.local_rank + 1} on its machine, which has {number} devices"
                )
            self.device = torch.device(self.device.type, here.local_rank)
            torch.accelerator.set_device_index(self.device.index)
        self.group: Collective = Collective(self.device, config.timeout_s)
        self.precision = PRECISIONS[self.group.agree(PRECISIONS.index(self.precision))]  # found by measuring
        self.lay_out(here.world)

    def lay_out(self, world: int) -> None:
        """Set the ranks of the process group up as a mesh."""
        replicate, shard, context, tensor = mesh_shape(self.config, world)
        self.mesh = init_device_mesh(
            self.device.type, (replicate, shard * context, tensor), mesh_dim_names=("replicate", "shard", "tensor")
        )
        parts = (replicate * shard, context, tensor)
        of_batches = init_device_mesh(self.device.type, parts, mesh_dim_names=("data", "context", "tensor"))
        self.compiles_dynamic = tensor == 1  # torch 2.13 compiles no cut layers for changing shapes
        self.data_group = of_batches.get_group("data")
        self.rank, self.world = of_batches.get_local_rank("data"), replicate * shard
        self.context = ContextParallel(of_batches.get_group("context"), self.device) if context > 1 else None
        self.has_whole_rows = self.context is None

    @classmethod
    def check(cls, config: RunConfig) -> None:
        engine: Any = config.engine
        _check_shared_state(config)
        _, _, context, tensor = cls.check_for(config, place().world)
        if engine.cpu_offload and not torch.accelerator.is_available():
            raise UserError("engine.cpu_offload: there is no accelerator whose memory it would spare; leave it out")
        if tensor > 1:
            check_tensor_parallel(load_config(config.model), tensor)
        if context > 1:
            check_architecture(load_config(config.model), config.model.attention)

    @classmethod
    def check_for(cls, config: RunConfig, world: int) -> tuple[int, int, int, int]:
        """What of `check` needs none of the architecture's code, for so many ranks; returns the mesh's shape."""
        method: Any = config.method
        shape = _, shard, context, tensor = mesh_shape(config.engine, world)
        for setting, whole_only in (("init", "pissa"), ("weights", "stream")):
            if getattr(method, setting, "") == whole_only:
                raise UserError(
                    f"method.{setting}: {whole_only} needs whole weights, of which each rank holds a part: leave it out"
                )
        if method.name == "chunk" and method.rounding == "stochastic":
            raise UserError("method.rounding: stochastic draws on each rank by itself: set it to master")
        if getattr(method, "memory", None) is not None:
            raise UserError("method.memory foresees one device alone: set method.num_chunks instead")
        if method.name == "chunk" and config.model.precision == "mixed":
            raise UserError(
                "model.precision: mixed: chunk keeps fp32 masters itself on several ranks: set it to bf16 or fp32"
            )
        if tensor > 1 and getattr(method, "dora", False):
            raise UserError(
                "method.dora needs norms of whole weights, which engine.tensor_parallel cuts: leave one out"
            )
        if shard * context * tensor == 1:
            return shape
        architecture = load_config(config.model)
        if is_multimodal(architecture) and getattr(method, "targets", "") != "all-linear":
            raise UserError(
                f"{config.model.path}: what reads images or sounds gets gradients only on ranks that have some, but sharded "
                "weights need them of all: use method: lora with its default targets, or engine.replicate as large as the ranks"
            )
        return shape

    def load(
        self, config: ModelConfig, dtype: torch.dtype, head: HeadKind = "language", num_labels: int = 0,
        needs_weights: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        if not self.is_sharded or needs_weights or why_whole(config):
            return super().load(config, dtype, head, num_labels)
        model, self.checkpoint = empty_model(config, dtype, head, num_labels)
        self.small = sibling(model)
        return model, self.small

    def adapting(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext() if self.checkpoint is None else self.checkpoint.standing_in(model)

    def place(self, model: Any) -> Any:
        """As on a single device, and then cut the weights; those that are not there yet are read when they are cut."""
        if self.context is not None:
            self.context.attach(model)
        super().place(model)
        model.inside = MethodType(_call, model)
        self.partial = tensor_parallel(model, self.mesh["tensor"])
        if packed := [name for name, p in model.named_parameters() if p.requires_grad and is_interleaved(p)]:
            raise UserError(
                f"engine.tensor_parallel: {packed[0]} is two weights in one, of which checkpoints cannot hold parts yet: train "
                "it with method: lora, or leave tensor parallelism out"
            )
        if self.is_sharded:
            self._shard(model)
        if self.checkpoint is not None:
            on_host = torch.device("cpu") if self.config.cpu_offload else self.device
            self.checkpoint.fill(model, on_host, buffers=self.device)
            self.checkpoint, self.small = None, None
        if self.context is not None:
            self._check_cut(model, self.context)
        return model

    def _check_cut(self, model: Any, context: ContextParallel) -> None:
        self._run(model, lambda: check_cut(model, self.head, context))
        self.let_go(model)

    def _head_of(self, model: Any) -> Head:
        return super()._head_of(model) if self.checkpoint is None else find_head_by(self.small, model)

    def _move(self, model: Any) -> None:
        if not self.is_sharded:  # FSDP moves no more than a rank's part
            super()._move(model)

    @property
    def is_sharded(self) -> bool:
        return self.mesh["shard", "tensor"].size() > 1

    def _shard(self, model: Any) -> None:
        """Every block by itself; the rest (embeddings, last norm, head) together, which is gathered all the while."""
        config = self.config
        if self.device.type == "cpu":
            keep_freed_memory(KEPT_BYTES)
        mesh = self.mesh["shard"] if self.mesh["replicate"].size() == 1 else self.mesh["replicate", "shard"]
        mixed = (
            MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.precision == "mixed" else MixedPrecisionPolicy()
        )
        offload: OffloadPolicy = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
        for _, block in blocks(model):
            fully_shard(
                block,
                mesh=mesh,
                mp_policy=mixed,
                offload_policy=offload,
                reshard_after_forward=config.reshard_after_forward,
            )
        fully_shard(model, mesh=mesh, mp_policy=mixed, offload_policy=offload)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "inside")

    def activations(self, model: Any, rows: int, tokens: int) -> Activations:
        return super().activations(model, rows, -(-tokens // self.config.context_parallel))

    def columns(self, batch: Batch) -> Columns:
        return ALL if self.context is None else Cut(self.context, batch)

    def _run(self, model: Any, compute: Callable[[], Found]) -> Found:
        with self._autocast():
            found: Found = model.inside(compute)
            return found

    def rows(self, batch: Batch) -> slice:
        borders = batch.part_borders(self.world)
        return slice(*borders[self.rank : self.rank + 2]) if self.rank + 1 < len(borders) else slice(0, 0)

    def micro_batches(self, batch: Batch, tokens: int) -> list[Batch]:
        of_ranks = batch.split_borders(tokens, self.world)
        own = of_ranks[self.rank] if self.rank < len(of_ranks) else [0]
        pieces = [batch.rows(start, stop) for start, stop in pairwise(own)]
        return pieces + [batch.nothing()] * (max(map(len, of_ranks)) - len(own))

    def sum(self, x: Tensor) -> Tensor:
        if self.world == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total, group=self.data_group)
        return total

    def sums(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        together = self.sum(torch.cat([x.detach().double().flatten() for x in numbers.values()]))
        pieces = together.split([x.numel() for x in numbers.values()])
        return {name: piece.view(x.shape).to(x.dtype) for (name, x), piece in zip(numbers.items(), pieces, strict=True)}

    def save_checkpoint(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
        save_parts(folder, step, state, keep, self.group.writers)

    def load_checkpoint(
        self, folder: Path, warn: Callable[[str], None], room: Room
    ) -> tuple[int, dict[str, Any]] | None:
        return load_parts(folder, warn, room, self.group.writers)

    def seed(self, seed: int, step: int) -> None:
        """Ranks that read the same columns of the same rows, and share the inside of layers out, drop the same."""
        part = 0 if self.context is None else self.context.rank
        super().seed(seed + self.rank * self.config.context_parallel + part, step)
        self.group.at(step + 1, "training")

    def let_go(self, model: Any) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def save_model(self, model: Any, folder: Path) -> None:
        self.let_go(model)
        save_sharded(model, folder, self.group.rank, self.group.world)

    def save_adapter(self, peft_model: Any, folder: Path, **options: Any) -> None:
        self.let_go(peft_model)
        save_adapter(peft_model, folder, self.group.rank)

    def reduce(self, grads: Mapping[str, Tensor]) -> None:
        """Sum what FSDP has not: over parts of the batch the gradients of weights that every rank holds whole, and over parts
        of layers those that each of them adds to."""
        if not self.is_sharded:
            under_way = [dist.all_reduce(grad, group=self.data_group, async_op=True) for grad in grads.values()]
            for work in under_way:
                work.wait()
        if self.mesh["tensor"].size() > 1:
            for name, grad in grads.items():
                if name.partition("[")[0] in self.partial:  # a chunk's rows are named behind their parameter
                    dist.all_reduce(local_part(grad), group=self.mesh.get_group("tensor"))
            if not self.has_checked:
                check_replicated(grads, self.mesh["tensor"])
                self.has_checked = True

    def norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        cuts: dict[tuple[str, ...], list[Tensor]] = {}
        for grad in grads.values():
            cuts.setdefault(cut_over(grad), []).append(local_part(grad))
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for cut, parts in cuts.items():
            norms = torch._foreach_norm(parts, 2, torch.promote_types(parts[0].dtype, torch.float32))
            total += self._sum_over(torch.stack(norms).double().square().sum(), cut)
        return total.sqrt()

    def _sum_over(self, x: Tensor, cut: tuple[str, ...]) -> Tensor:
        for name in cut:
            dist.all_reduce(x, group=self.mesh.get_group(name))
        return x


def _check_shared_state(config: RunConfig) -> None:
    """Optimizer state that ranks cannot hold and save in parts. Raises UserError."""
    name, cut = config.optimizer.name, "which the ranks of the fsdp engine cut"
    if name == "adafactor":
        raise UserError(f"optimizer: adafactor sums over whole matrices, {cut}; use adamw, or lion with half its state")
    if name == "adamw8bit":
        raise UserError(
            f"optimizer: adamw8bit keeps 256 numbers together, {cut}; use adamw, or lion with half its state"
        )
    if config.method.name == "chunk" and config.method.state == "8bit":
        raise UserError(f"method.state: 8bit keeps 256 numbers together, {cut}; set it to keep or reset")


def cut_over(x: Tensor) -> tuple[str, ...]:
    """Names of the mesh's dimensions over which a tensor is cut; none where every rank holds it whole."""
    if not isinstance(x, DTensor):
        return ()
    names = x.device_mesh.mesh_dim_names
    assert names is not None
    return tuple(name for name, placement in zip(names, x.placements, strict=True) if not placement.is_replicate())


def is_interleaved(p: Tensor) -> bool:
    """Whether a rank's part of a tensor is of several stretches."""
    return isinstance(p, DTensor) and any(isinstance(placement, _StridedShard) for placement in p.placements)


def mesh_shape(config: Any, world: int) -> tuple[int, int, int, int]:
    """Ranks along replicate, shard, context and tensor. Raises UserError where they do not multiply to those there are."""
    given = {
        "replicate": config.replicate,
        "context_parallel": config.context_parallel,
        "tensor_parallel": config.tensor_parallel,
    }
    product = config.replicate * config.context_parallel * config.tensor_parallel
    if world % product:
        said = " × ".join(f"engine.{name} {number}" for name, number in given.items() if number > 1)
        raise UserError(f"{said} does not divide the {world} ranks that were started; change one of them")
    return config.replicate, world // product, config.context_parallel, config.tensor_parallel


def _call(_model: Any, compute: Callable[[], Found]) -> Found:
    return compute()
