"""Which weights of a model tensor parallelism cuts, and how: by transformers' plan for the architecture, or by names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from tunesmith.errors import UserError


class Cut(Enum):
    """What becomes of one module or parameter; weights of linear layers are [out, in]."""

    COLUMNS = "outputs shared out"
    ROWS = "inputs shared out, outputs summed"
    COLUMNS_GATHERED = "outputs shared out and gathered again"
    ROWS_OF_WHOLE = "inputs cut here and shared out, outputs summed"
    PACKED_COLUMNS = "outputs shared out, of each of the two halves"
    PARTIAL_GRADIENT = "whole; each rank's gradient is one part of a sum"
    SHARED_KEYS = "whole; the last part of its outputs goes to the heads of all ranks"
    EXPERTS = "outputs of its shared out weights summed"
    LOCAL = "computes with this rank's part of its own parameters"


STYLES: Mapping[str, Cut | None] = {
    "colwise": Cut.COLUMNS,
    "rowwise": Cut.ROWS,
    "colwise_gather_output": Cut.COLUMNS_GATHERED,
    "colwise_rep": Cut.COLUMNS_GATHERED,
    "rowwise_split_input": Cut.ROWS_OF_WHOLE,
    "rowwise_rep": Cut.ROWS_OF_WHOLE,
    "packed_colwise": Cut.PACKED_COLUMNS,
    "replicated_with_grad_allreduce": Cut.PARTIAL_GRADIENT,
    "mla_kv_a_proj": Cut.SHARED_KEYS,
    "moe_tp_experts": Cut.EXPERTS,
    "local_params": Cut.LOCAL,
    "replicate": None,
}
"""transformers' names; None: nothing is done."""

OF_LINEAR = (Cut.COLUMNS, Cut.ROWS, Cut.COLUMNS_GATHERED, Cut.ROWS_OF_WHOLE)
OF_PARAMETER = (Cut.COLUMNS, Cut.ROWS, Cut.PACKED_COLUMNS)

GROUPS = (
    ({"q_proj", "k_proj", "v_proj"}, {"o_proj", "out_proj", "dense"}),
    ({"gate_proj", "up_proj"}, {"down_proj"}),
    ({"fc1"}, {"fc2"}),
)
"""Linear layers that stand alone in a module: the first ones read its input, one of the second writes its output."""


@dataclass(frozen=True)
class Plan:
    """Cuts by the name of a module or parameter, relative to the decoder, and the sizes that the degree must divide."""

    cuts: Mapping[str, Cut]
    sizes: Mapping[str, int]

    def check(self, degree: int) -> None:
        """Raises UserError where a size does not divide."""
        wrong = [f"{size} {what}" for what, size in self.sizes.items() if size % degree]
        if wrong:
            common = math.gcd(*self.sizes.values())
            shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if wrong[3:] else "")
            would_do = [str(number) for number in range(2, common + 1) if common % number == 0]
            raise UserError(
                f"engine.tensor_parallel: {degree} ranks cannot share out {shown} evenly; "
                f"set it to {' or '.join(['1', *would_do])}"
            )


def check_tensor_parallel(model_config: Any, degree: int) -> None:
    """Raises UserError where `degree` ranks cannot share out the weights of a model of this transformers config.

    Knows the model by its shapes, without weights. One whose code transformers does not hold is left to `plan_of`.
    """
    from transformers import AutoModel

    config = model_config.get_text_config()
    if degree == 1 or not _is_known(config):
        return
    with torch.device("meta"):
        decoder = AutoModel.from_config(config, dtype=torch.bfloat16)
    plan = plan_of(decoder, config, degree)
    if _failure(decoder) is not None and config.base_model_tp_plan:  # it does not compute without weights either way
        return
    for name, cut in plan.cuts.items():
        _cut_shapes(decoder, name, cut, degree)
    if failure := _failure(decoder):
        raise UserError(
            f"engine.tensor_parallel: {type(decoder).__name__} does not compute with a part of its heads ({failure}); "
            "set it to 1"
        )


def plan_of(decoder: Any, config: Any, degree: int) -> Plan:
    """How `degree` ranks share out the decoder's weights. Raises UserError where they cannot, naming degrees that would do.

    decoder: the language model without its head, PEFT's LoRA layers in it or not. config: its own.
    """
    named = {**dict(decoder.named_modules()), **dict(decoder.named_parameters())}
    by_style = dict(_by_transformers(decoder, config, named)) or (_by_names(named) if _is_known(config) else {})
    if not by_style:
        raise UserError(
            f"engine.tensor_parallel: neither has transformers a plan for {type(decoder).__name__}, nor are its layers named "
            "so that one could be made; set it to 1"
        )
    cuts: dict[str, Cut] = {}
    sizes: dict[str, int] = {}
    for name, style in by_style.items():
        if style not in STYLES:
            raise UserError(
                f"engine.tensor_parallel: transformers' plan for {type(decoder).__name__} cuts {name} by {style!r}, which is "
                "not supported; set it to 1"
            )
        cut = STYLES[style]
        if cut is not None:
            _check_target(name, named[name], cut, by_style)
            cuts[name] = cut
            sizes |= _size(name, named[name], cut)
    plan = Plan(cuts, _heads(config, cuts) | sizes)
    plan.check(degree)
    return plan


def _is_known(config: Any) -> bool:
    """Whether transformers holds the architecture's code, so that a plan by names can be tried on its shapes."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return type(config) in MODEL_MAPPING


def _by_transformers(decoder: Any, config: Any, named: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, style) of what the architecture's own plan names and this model has; embeddings stay whole."""
    plan = {f".{pattern}": style for pattern, style in (config.base_model_tp_plan or {}).items()}
    embedding = decoder.get_input_embeddings()
    for name, target in named.items():
        style = plan.get(_any_layer(f".{name}"))
        if style is not None and target is not embedding:
            yield name, style


def _any_layer(name: str) -> str:
    """The name as transformers' plans have it, with * for a layer's number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _by_names(named: Mapping[str, Any]) -> dict[str, str]:
    """(name, style) of linear layers that are alone in their module and have the names of `GROUPS`."""
    found: dict[str, str] = {}
    for name, module in named.items():
        if not isinstance(module, nn.Module) or next(module.parameters(recurse=False), None) is not None:
            continue
        children = [child for child, inside in module.named_children() if next(inside.parameters(), None) is not None]
        for first, last in GROUPS:
            out = [child for child in children if child not in first]
            if len(children) == len(first) + 1 and len(out) == 1 and out[0] in last:
                found |= {f"{name}.{child}": "rowwise" if child in out else "colwise" for child in children}
    return found


def base_of(module: nn.Module) -> nn.Module:
    """The layer itself, where PEFT's LoRA has wrapped it. Raises UserError where something else has."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return module
    if type(module) is not Linear:
        raise UserError(
            f"engine.tensor_parallel: adapters of the kind {type(module).__module__}.{type(module).__name__} are not "
            "supported; set it to 1, or name linear layers in method.targets, not experts"
        )
    if module.lora_variant:
        kind = type(next(iter(module.lora_variant.values()))).__name__.removesuffix("LinearVariant")
        raise UserError(
            f"engine.tensor_parallel: {kind} needs whole rows of the weights, which no rank has; set it to 1, or train "
            "ordinary LoRA (method.dora: false)"
        )
    return module.base_layer


def _check_target(name: str, target: Any, cut: Cut, by_style: Mapping[str, str]) -> None:
    """Raises UserError where the cut is not for what the model has there."""
    if isinstance(target, nn.Parameter):
        fits = cut in OF_PARAMETER
    elif type(base := base_of(target)) is nn.Linear:
        fits = cut in (*OF_LINEAR, Cut.SHARED_KEYS)
    elif base is not target:
        fits = False
    elif cut is Cut.EXPERTS:  # a parameter that is left whole would be counted once on every rank
        fits = all(f"{name}.{parameter}" in by_style for parameter, _ in target.named_parameters())
    else:
        fits = cut in (Cut.PARTIAL_GRADIENT, Cut.LOCAL)
    if not fits:
        raise UserError(
            f"engine.tensor_parallel: {name} is a {type(target).__name__}, whose weights cannot be shared out by the plan of "
            "the architecture; set it to 1"
        )


def _size(name: str, target: Any, cut: Cut) -> dict[str, int]:
    """What the degree must divide, by what it is, with * for the number of a layer."""
    if cut not in OF_LINEAR and cut not in OF_PARAMETER:
        return {}
    weight: Any = target if isinstance(target, nn.Parameter) else base_of(target).weight
    size = weight.shape[dim_of(cut, weight.ndim)]
    if cut is Cut.PACKED_COLUMNS:
        size //= 2
    side = "inputs" if cut in (Cut.ROWS, Cut.ROWS_OF_WHOLE) else "outputs"
    return {f"{side} of {_any_layer(name)}": size}


def dim_of(cut: Cut, ndim: int) -> int:
    """The dimension along which a weight is cut: [out, in], or [expert, out, in], or one number an output."""
    return ndim - 1 if cut in (Cut.ROWS, Cut.ROWS_OF_WHOLE) else max(0, ndim - 2)


def _heads(config: Any, cuts: Mapping[str, Cut]) -> dict[str, int]:
    """Numbers of heads that are shared out, by what they are."""
    columns = [name.split(".") for name, cut in cuts.items() if cut is Cut.COLUMNS]
    inside = [parts[-1] for parts in columns if any("attn" in part or "attention" in part for part in parts[:-1])]
    numbers = {}
    if inside:
        numbers["attention heads"] = config.num_attention_heads
    if {"k_proj", "v_proj"} & set(inside):
        numbers["key and value heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return numbers


def _cut_shapes(decoder: Any, name: str, cut: Cut, degree: int) -> None:
    """Give the weights without storage the shapes that one rank holds."""
    if cut not in (Cut.COLUMNS, Cut.ROWS, Cut.PACKED_COLUMNS):  # others take and give whole tensors
        return
    owner, _, own = name.rpartition(".")
    parent = decoder.get_submodule(owner)
    if own in parent._parameters:
        targets = [(parent, own)]
    else:
        linear = parent.get_submodule(own)
        whole_bias = linear.bias is None or cut is Cut.ROWS
        targets = [(linear, "weight")] if whole_bias else [(linear, "weight"), (linear, "bias")]
    for module, parameter in targets:
        weight = getattr(module, parameter)
        shape = list(weight.shape)
        shape[dim_of(cut, weight.ndim)] //= degree
        setattr(
            module, parameter, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device="meta"), requires_grad=False)
        )


@torch.no_grad()
def _failure(decoder: Any) -> str | None:
    """What is said when the decoder computes with a few tokens; None if nothing.

    Seven: code that views outputs as [-1, all heads, head size] would find a whole number of shorter sequences in eight.
    """
    tokens = torch.zeros(1, 7, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool, device="meta")
    try:
        decoder(input_ids=tokens, position_ids=tokens, attention_mask=mask, use_cache=False)
    except Exception as error:  # each architecture raises types of its own
        return str(error).splitlines()[0]
    return None
