"""What a run will hold and send on each of many ranks, found on one machine without weights, data or devices.

The real engine and method work on tensors without numbers, and a process group that sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_leaves

from tunesmith.config import FsdpConfig, RunConfig
from tunesmith.engines.fsdp import FsdpEngine, cut_over, mesh_shape
from tunesmith.errors import UserError
from tunesmith.methods import Extent, build_method
from tunesmith.models.head import Head, at_least_fp32, rows_at_once
from tunesmith.models.load import blocks, decoder_of, head_kind, shape_of_model, value_head
from tunesmith.models.probe import find_head
from tunesmith.models.sibling import sibling
from tunesmith.objectives import build_objective
from tunesmith.plan.traffic import Count, Traffic, group_names
from tunesmith.tensors import bytes_here, laid_out, layout_of, local_part, mesh_of, sum_gradient
from tunesmith.types import Wanted


@dataclass(frozen=True)
class Plan:
    """Of one rank: bytes that it holds, and what a step sends and computes."""

    shape: tuple[int, int, int, int]
    """Ranks along replicate, shard, context and tensor."""
    precision: str
    memory: dict[str, int]
    """Bytes by what they are for."""
    traffic: dict[tuple[str, str], Count]
    """Of a step, by (kind, dimension of the mesh)."""
    micro_batches: int
    rows: int
    """Of a micro-batch."""
    tokens: int
    """Of a row."""
    flops: float
    """Of a step."""


class PlannedEngine(FsdpEngine):
    """The engine of several ranks, of which there is one, and no device."""

    has_checked = True

    def __init__(self, config: Any, precision: str, world: int, head: Head) -> None:
        self.config, self.precision, self.device = config, precision, torch.device("cpu")
        self.head = head
        self.lay_out(world)

    def _head_of(self, model: Any) -> Head:
        return self.head

    def _move(self, model: Any) -> None:
        pass


def plan(config: RunConfig, world: int) -> Plan:
    """What each of `world` ranks will hold and send. Raises UserError."""
    config = _with_fsdp(config, world)
    FsdpEngine.check_for(config, world)
    with _process_group(world):
        try:
            return _plan(config, world)
        except RuntimeError as error:  # torch's for what needs numbers
            raise UserError(
                f"{config.model.path}: this architecture cannot be planned, since it does not compute with tensors without "
                f"numbers ({str(error).splitlines()[0]}); another model.precision may do"
            ) from error


def _with_fsdp(config: RunConfig, world: int) -> RunConfig:
    if config.method.name == "zeroth":
        raise UserError(
            "method: zeroth: ranks send each other a few numbers a step, whatever the model: nothing to plan"
        )
    engine = config.engine
    if engine.name == "replicas" or (engine.name == "single" and world > 1):
        raise UserError(f"engine: {engine.name} does not train on {world} ranks: set it to fsdp or auto")
    if engine.name != "fsdp":
        engine = FsdpConfig(activation_checkpointing=engine.activation_checkpointing)
    if engine.context_parallel > 1:
        raise UserError("engine.context_parallel: what its ranks send each other cannot be planned yet; set it to 1")
    return config.model_copy(update={"engine": engine.model_copy(update={"compile": False})})


@contextmanager
def _process_group(world: int) -> Iterator[None]:
    """One rank of so many that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # it registers the backend

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _plan(config: RunConfig, world: int) -> Plan:
    objective, section = build_objective(config.objective), config.engine
    assert isinstance(section, FsdpConfig), "_with_fsdp has seen to it"
    shape = mesh_shape(section, world)
    tokens, limit = config.data.max_tokens, config.train.micro_batch_tokens
    assert limit is not None, "RunConfig fills it"
    group = 2 if objective.form == "pairs" else 1  # rows that never part
    of_rank = ceil(config.train.batch_size / (shape[0] * shape[1])) * group
    rows = min(of_rank, max(1, limit // tokens // group) * group)
    number = ceil(of_rank / rows)

    method = build_method(config, Extent(config.train.steps or 10**6, rows, tokens, number > 1, config.seed, tokens))
    precision = config.model.precision
    if precision == "auto":  # on devices that multiply bf16 fast
        precision = "mixed" if method.needs_fp32_weights(config.method) else "bf16"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model: Any = shape_of_model(config.model, dtype, objective.head, objective.num_labels)
    head = find_head(sibling(model)) if objective.head == "language" else Head(None)
    # weights that wait in the host's memory are as many, and sent as often
    engine = PlannedEngine(section.model_copy(update={"cpu_offload": False}), precision, world, head)
    method.adapt(model)
    engine.place(model)
    mode = FakeTensorMode()
    model._apply(lambda x: _without_numbers(x, mode))
    with mode:
        method.bind(model, engine)
        method.ready(several=number > 1 or engine.world > 1)
        model.train()
        activations, traffic = _step(
            engine, model, method, torch.zeros(rows, tokens, dtype=torch.long), number, objective.wanted
        )
    memory = held(model, method) | {"activations": activations} | _passing(engine, model, rows * tokens)
    return Plan(
        shape, precision, memory, traffic, number, rows, tokens, _flops(engine, model, tokens) * of_rank * tokens
    )


def _without_numbers(x: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of the same shape and cut on the CPU that takes no memory."""
    part = local_part(x)
    with mode:
        fake = torch.empty(part.shape, dtype=part.dtype, device="cpu")
    return laid_out(fake, layout_of(x))


def _step(
    engine: PlannedEngine, model: Any, method: Any, tokens_BT: Tensor, micro_batches: int, wanted: Wanted
) -> tuple[int, dict[tuple[str, str], Count]]:
    """(bytes that a micro-batch's forward pass keeps, what a step sends)."""
    checkpointing = engine.config.activation_checkpointing
    names = group_names(engine.mesh, data=engine.data_group)
    each, once = Traffic(names), Traffic(names)
    engine.checkpoint_blocks(model, False)
    with each, _keeping(model) as kept:
        loss = _loss(engine, model, tokens_BT, wanted)
    if checkpointing:  # once more, since what a block keeps can be seen without it alone
        engine.let_go(model)
        engine.checkpoint_blocks(model, True)
        each = Traffic(names)
        with each:
            loss = _loss(engine, model, tokens_BT, wanted)
    with each:
        loss.backward()
    active = method.active()
    for p in active.values():
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad
    with once:
        engine.reduce({name: p.grad for name, p in active.items()})
        kept_gradients = {name: p.grad for name, p in active.items()}
        method.update(1e-3)
    for name, p in active.items():
        p.grad = kept_gradients[name]  # of 16-bit weights chunk lets go of them
    counts = {
        key: each.counts.get(key, Count()).times(micro_batches).plus(once.counts.get(key, Count()))
        for key in sorted(each.counts.keys() | once.counts.keys())
    }
    return kept.peak(checkpointing), counts


def _loss(engine: PlannedEngine, model: Any, tokens_BT: Tensor, wanted: Wanted) -> Tensor:
    """A number that depends on all weights. It asks the output layer for one token; `_passing` knows what the others take.

    Ranks that share out the vocabulary sum the gradient of all hidden states that predict a token, and gather logits if asked.
    """
    head: Any = model.get_output_embeddings() if head_kind(model) == "language" else value_head(model)

    def compute() -> Tensor:
        hidden_BTD = decoder_of(model)(input_ids=tokens_BT, use_cache=False)[0]
        if (mesh := mesh_of(head.weight)) is not None:
            if wanted.reads_logits:
                logits_NV = hidden_BTD.new_empty(hidden_BTD[:, :-1, 0].numel(), len(local_part(head.weight)))
                DTensor.from_local(at_least_fp32(logits_NV), mesh, [Shard(1)], run_check=False).full_tensor()
            hidden_D = sum_gradient(hidden_BTD[:, :-1], mesh)[0, -1]
            return (local_part(head.weight) @ hidden_D.to(head.weight.dtype)).float().sum()
        return head(hidden_BTD[:1, -1].to(head.weight.dtype)).float().sum()

    return engine._run(model, compute)


class _Kept:
    """Bytes that a forward pass keeps for the backward pass beside weights."""

    def __init__(self) -> None:
        self.block = -1
        """In which the pass is; -1: in none."""
        self.by_block: dict[int, int] = {}
        self.entering = 0
        """Of the blocks' inputs."""
        self.known: set[int] = set()

    def enter(self, number: int, block: Any, args: Any) -> None:
        self.block = number
        self.entering += next(bytes_here(x) for x in tree_leaves(args) if isinstance(x, Tensor))
        self.known |= {_place(p) for p in block.parameters()}

    def note(self, x: Tensor) -> Tensor:
        if (place := _place(x)) not in self.known:
            self.known.add(place)
            size = local_part(x.detach()).untyped_storage().nbytes()
            self.by_block[self.block] = self.by_block.get(self.block, 0) + size
        return x

    def peak(self, checkpointing: bool) -> int:
        """With checkpointing inputs alone are kept, and one block's all."""
        if not checkpointing:
            return sum(self.by_block.values())
        return self.by_block.get(-1, 0) + self.entering + max(self.by_block.get(n, 0) for n in self.by_block if n >= 0)


@contextmanager
def _keeping(model: Any) -> Iterator[_Kept]:
    kept = _Kept()
    kept.known |= {_place(x) for x in (*model.parameters(), *model.buffers())}
    handles = []
    for number, (_, block) in enumerate(blocks(model)):
        handles.append(
            block.register_forward_pre_hook(lambda block, args, number=number: kept.enter(number, block, args))
        )
        handles.append(block.register_forward_hook(lambda *_: setattr(kept, "block", -1)))
    with saved_tensors_hooks(kept.note, lambda x: x):
        yield kept
    for handle in handles:
        handle.remove()


def held(model: Any, method: Any) -> dict[str, int]:
    """Bytes of what a rank holds from step to step, and of gradients before an update."""
    state = {name: value for name, value in method.state_dict().items() if name != "parameters"}
    return {
        "weights": bytes_here([*model.parameters(), *model.buffers()]),
        "gradients": bytes_here([p.grad for p in method.active().values()]),
        "optimizer state": bytes_here(state),
    }


def _passing(engine: PlannedEngine, model: Any, tokens: int) -> dict[str, int]:
    """Estimates: weights gathered at the peak, their gradients before they are summed, and the output layer's chunk."""
    found = {"gathered weights": 0, "gradients of gathered weights": 0, "logits": 0}
    number = engine.mesh["tensor"].size()

    def size(parameters: Any, trained_only: bool = False) -> int:
        return sum(
            p.numel()
            // (number if "tensor" in cut_over(p) else 1)
            * (2 if engine.precision == "mixed" else p.element_size())
            for p in parameters
            if p.requires_grad or not trained_only
        )

    if engine.is_sharded:
        of_blocks = [list(block.parameters()) for _, block in blocks(model)]
        inside = {id(p) for parameters in of_blocks for p in parameters}
        rest = [p for p in model.parameters() if id(p) not in inside]
        resharded = engine.config.reshard_after_forward  # then one block computes, and the next one's weights come
        sizes = sorted(map(size, of_blocks))
        found["gathered weights"] = size(rest) + sum(sizes[-2:] if resharded else sizes)
        found["gradients of gathered weights"] = size(rest, True) + max(
            size(parameters, True) for parameters in of_blocks
        )
    output = model.get_output_embeddings() if head_kind(model) == "language" else None
    if output is not None:
        vocabulary, width = output.weight.shape
        vocabulary //= number if "tensor" in cut_over(output.weight) else 1
        trained = vocabulary * width if output.weight.requires_grad else 0
        rows = tokens if engine.head.linear is None else min(tokens, rows_at_once(vocabulary, trained))
        # logits, log-probabilities and their gradient; the weight's gradient, of a chunk and of all of them
        found["logits"] = 3 * 4 * rows * vocabulary + 8 * trained
    return found


def _flops(engine: PlannedEngine, model: Any, tokens: int) -> float:
    """Of a step for a token of a row of so many: 2 for each weight and pass. Forward and backward to what is below are two
    passes, the gradient of a weight a third, and computing a block again a fourth."""
    config, number = model.config.get_text_config(), engine.mesh["tensor"].size()
    again = int(engine.config.activation_checkpointing)
    inside = {id(p) for _, block in blocks(model) for p in block.parameters()}
    output, total = model.get_output_embeddings(), 0.0
    for p in model.parameters():
        is_looked_up = p is model.get_input_embeddings().weight and (output is None or output.weight is not p)
        if p.ndim >= 2 and not is_looked_up:
            share = getattr(config, "num_experts_per_tok", None) or 1 if p.ndim == 3 else p.shape[0]
            passes = (3 if p.requires_grad else 2) + again * (id(p) in inside)
            total += (
                2
                * passes
                * p.numel()
                / p.shape[0]
                * min(share, p.shape[0])
                / (number if "tensor" in cut_over(p) else 1)
            )
    if heads := getattr(config, "num_attention_heads", None):  # causal: half of the row is seen
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        total += 2 * tokens * width * len(blocks(model)) * (3 + again) / number
    return total


def _place(x: Tensor) -> int:
    return local_part(x.detach()).untyped_storage()._cdata
