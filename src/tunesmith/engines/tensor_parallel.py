"""Tensor parallelism: each rank holds a part of every large weight, and computes with it (Shoeybi et al. 2019).

A block's first layers give each rank some of the heads or channels; its last ones sum over ranks. Between blocks every
rank has the same, whole activations. The output layer gives each rank the logits of a part of the vocabulary. Embeddings and
norms are whole on every rank, and their gradients there equal; so is an output layer that shares its weight with the
embeddings, or that an adapter has wrapped. Weights become DTensors over one dimension of the mesh; `fully_shard` may cut them
further afterwards.
Local tensors cross the borders of modules, so that transformers' code sees fewer heads and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from tunesmith.engines.tensor_plan import Cut, base_of, check_tensor_parallel, dim_of, plan_of
from tunesmith.errors import UserError
from tunesmith.models.load import decoder_name, decoder_of, is_multimodal
from tunesmith.tensors import sum_gradient, summed

PIECES = 64
"""Sums by which a gradient is compared."""

__all__ = ["check_replicated", "check_tensor_parallel", "tensor_parallel"]


def tensor_parallel(model: Any, mesh: DeviceMesh) -> frozenset[str]:
    """Cut the model's weights over a mesh of one dimension, in place; before `fully_shard`, after adapters are in.

    All ranks of the mesh must hold the same weights, and from now on read the same batch and seed the same random
    streams, so that what is dropped out of whole activations is the same on all; of their parts each drops the same places.
    Returns the names of parameters that stay whole and get only a part of their gradient on each rank: sum these over
    the mesh after the backward pass. Raises UserError as `plan_of` does.
    """
    if mesh.size() == 1:
        return frozenset()
    decoder: Any = decoder_of(model)
    partial = set()
    readers: dict[str, list[nn.Module]] = {}
    for name, cut in plan_of(decoder, model.config.get_text_config(), mesh.size()).cuts.items():
        owner, _, own = name.rpartition(".")
        parent = decoder.get_submodule(owner)
        if own in parent._parameters:
            _cut_parameter(parent, own, cut, mesh)
            continue
        module = parent.get_submodule(own)
        if cut is Cut.PARTIAL_GRADIENT:
            partial |= {f"{decoder_name(model)}{name}.{parameter}" for parameter, _ in module.named_parameters()}
        elif cut is Cut.SHARED_KEYS:
            _share_keys(module, model.config.get_text_config().qk_rope_head_dim, mesh)
        elif cut in (Cut.EXPERTS, Cut.LOCAL):
            _compute_locally(module, mesh, is_summed=cut is Cut.EXPERTS)
        else:
            _cut_linear(module, cut, mesh)
            if cut in (Cut.COLUMNS, Cut.COLUMNS_GATHERED):
                readers.setdefault(owner, []).append(base_of(module))
    for owner, layers in readers.items():
        _share_input(decoder.get_submodule(owner), layers, mesh)
    if parts_vocabulary(model, mesh.size()):
        _cut_linear(model.get_output_embeddings(), Cut.COLUMNS_GATHERED, mesh)
    return frozenset(partial)


def parts_vocabulary(model: Any, degree: int) -> bool:
    """Whether so many ranks share out the rows of the output layer. Called as a module it gathers all logits: `score_targets`
    does without, and models with images or sounds, which call it themselves, keep it whole."""
    output: Any = model.get_output_embeddings()
    return (
        type(output) is nn.Linear
        and not is_multimodal(model.config)
        and output.weight is not model.get_input_embeddings().weight
        and output.weight.shape[0] % degree == 0
    )


def check_replicated(grads: Mapping[str, Tensor], mesh: DeviceMesh) -> None:
    """Raises UserError where ranks found different gradients of a parameter that all of them hold whole.

    To be asked once, after the first backward pass and the sum of partial gradients: a plan that forgets to name a
    parameter shows here. grads: those of parameters by name; which of them are cut over the mesh is seen by their own.
    """
    names, prints = [], []
    for name, grad in grads.items():
        if isinstance(grad, DTensor):
            if set(mesh.mesh_dim_names or ()) & set(grad.device_mesh.mesh_dim_names or ()):
                continue
            grad = grad.to_local()
        pieces = [piece.sum(dtype=torch.float32) for piece in grad.flatten().tensor_split(PIECES)]
        names.append(name)
        prints.append(torch.stack([*pieces, torch.linalg.vector_norm(grad).float()]))
    if not names:
        return
    lowest, highest = torch.stack(prints), torch.stack(prints)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=mesh.get_group())
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=mesh.get_group())
    # sums of pieces of a difference are together about as large as it: rounding stays far below, a missing part far above
    is_wrong = (highest - lowest).norm(dim=1) > 0.05 * highest[:, -1]
    if wrong := [name for name, is_so in zip(names, is_wrong.tolist(), strict=True) if is_so]:
        raise UserError(
            f"engine.tensor_parallel: ranks find different gradients of {wrong[0]} and {len(wrong) - 1} others, which the plan "
            "of the architecture does not say; set it to 1"
        )


def _cut_linear(module: nn.Module, cut: Cut, mesh: DeviceMesh) -> None:
    """A linear layer, and LoRA's B on the side of its outputs or A on that of its inputs.

    Where whole tensors go in and out, adapters stay as they are. The other one of A and B is whole, and so is its
    gradient: what comes back to it through the layer that is cut has been summed.
    """
    styles: dict[Cut, ParallelStyle] = {
        Cut.COLUMNS: ColwiseParallel(),
        Cut.ROWS: RowwiseParallel(),
        Cut.COLUMNS_GATHERED: ColwiseParallel(output_layouts=Replicate()),
        Cut.ROWS_OF_WHOLE: RowwiseParallel(input_layouts=Replicate()),
    }
    layers = [base_of(module)]
    adapted: Any = module
    if layers[0] is not module and cut is Cut.COLUMNS:
        layers += adapted.lora_B.values()
    if layers[0] is not module and cut is Cut.ROWS:
        layers += adapted.lora_A.values()
    for layer in layers:
        parallelize_module(layer, mesh, styles[cut], src_data_rank=None)


def _share_input(parent: nn.Module, layers: list[nn.Module], mesh: DeviceMesh) -> None:
    """Let layers that read the same tensor sum its gradient over ranks once, not each of them for itself."""
    seen: list[Any] = []

    def share(layer: nn.Module, args: Any) -> Any:
        if not seen or seen[0] is not args[0]:
            seen[:] = [args[0], DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)]
        return (seen[1], *args[1:])

    for layer in layers:
        layer.register_forward_pre_hook(share, prepend=True)
    parent.register_forward_hook(lambda *_: seen.clear(), always_call=True)


def _cut_parameter(module: nn.Module, name: str, cut: Cut, mesh: DeviceMesh) -> None:
    """A parameter that its module multiplies with itself, such as the weights of experts."""
    whole = getattr(module, name)
    dim = dim_of(cut, whole.ndim)
    # fused halves are cut each: torch has no public name for a part that is not one piece
    placement: Placement = _StridedShard(dim, split_factor=2) if cut is Cut.PACKED_COLUMNS else Shard(dim)
    part = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _compute_locally(module: nn.Module, mesh: DeviceMesh, is_summed: bool) -> None:
    """Let a module's own code see this rank's part of its own parameters. is_summed: its outputs are summed over ranks."""
    kept: dict[str, Any] = {}

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kept.update({name: p for name, p in module._parameters.items() if isinstance(p, DTensor)})
        module._parameters.update({name: p.to_local() for name, p in kept.items()})
        if is_summed:
            args = tuple(sum_gradient(x, mesh) for x in args)
            kwargs = {name: sum_gradient(x, mesh) for name, x in kwargs.items()}
        return args, kwargs

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        module._parameters.update(kept)
        kept.clear()
        return summed(output, mesh) if is_summed and output is not None else None

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave, always_call=True)


def _share_keys(module: nn.Module, width: int, mesh: DeviceMesh) -> None:
    """The last `width` outputs go to the heads of all ranks, past the layer whose input's gradient is summed."""

    def split(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rest, shared = output.split([output.shape[-1] - width, width], dim=-1)
        return torch.cat([rest, sum_gradient(shared, mesh)], dim=-1)

    module.register_forward_hook(split)
