"""Which tensors of a checkpoint make which parameters, by transformers' own rules, and the way back.

transformers keeps some models' weights otherwise than their checkpoints do (experts in one tensor, other names). Its loader
and saver apply these rules to the whole model at once; here each rule becomes a piece that can be run for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Shapes:
    """What conversions ask the model for: the parameters' shapes and types, whatever has become of the model itself."""

    config: Any
    tensors: Mapping[str, Tensor]

    def get_parameter(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class Piece:
    """Some tensors that become some others."""

    name: str
    """transformers' name for the result; of several results the first."""
    sources: tuple[tuple[str, str], ...]
    """(name, pattern that it matches) in the order in which they are put together."""
    converter: WeightConverter | None
    """None: one tensor under another name."""
    shapes: Shapes
    renamings: tuple[WeightRenaming, ...] = ()
    """Applied to the names of the results."""

    def run(self, get: Callable[[str], Tensor], only: Callable[[int], bool] = lambda _: True) -> dict[str, Tensor]:
        """The results by name. get: a source by its name.

        only: of each list of sources take those numbers alone (see `is_by_rows`).
        """
        if self.converter is None:
            return {self._named(self.name): get(self.sources[0][0])}
        converter = deepcopy(self.converter)
        number: dict[str, int] = {}
        for key, pattern in self.sources:
            number[pattern] = number.get(pattern, -1) + 1
            if only(number[pattern]):
                converter.add_tensor(self.name, key, pattern, lambda key=key: get(key))
        found = converter.convert(self.name, model=self.shapes, config=self.shapes.config)
        return {self._named(name): value[0] if isinstance(value, list) else value for name, value in found.items()}

    def is_by_rows(self) -> bool:
        """Whether the n-th row of the one result is made of the n-th source of each list alone (experts)."""
        if self.converter is None:
            return False
        first, *others = self.converter.operations
        return (
            type(first) is MergeModulelist
            and first.dim == 0
            and len(self.converter.target_patterns) == 1
            and all(_keeps_rows(operation) for operation in others)
        )

    def _named(self, name: str) -> str:
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return name


def _keeps_rows(operation: Any) -> bool:
    if type(operation) is Concatenate:
        return operation.dim > 0
    return type(operation) is Transpose and min(operation.dim0, operation.dim1) > 0 and not operation.check_dims


def loading_pieces(model: Any, keys: Iterable[str]) -> list[Piece]:
    """How the tensors of a checkpoint become the parameters and buffers of a model as transformers has built it."""
    transforms = get_model_conversion_mapping(model)
    renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in transforms if isinstance(rule, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    shapes = Shapes(model.config, known)
    found: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:  # a name that is right as it is
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name in known:
            found.setdefault(name, []).append((key, pattern))
    return [_piece(name, sources, converters, shapes) for name, sources in found.items()]


def saving_pieces(model: Any, tensors: Mapping[str, Tensor]) -> list[Piece]:
    """How a model's tensors become those of its checkpoint: as `save_pretrained` writes them.

    tensors: by the model's own names, on the meta device.
    """
    transforms = getattr(model, "_weight_conversions", None)  # those that its checkpoint needed
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [rule for rule in transforms if not isinstance(rule, PrefixChange)]
    back = [rule.reverse_transform() for rule in reversed(transforms)]
    renamings = tuple(rule for rule in back if isinstance(rule, WeightRenaming))
    converters = [rule for rule in back if isinstance(rule, WeightConverter)]
    shapes = Shapes(model.config, tensors)
    found: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, [], converters)
        found.setdefault(name, []).append((key, pattern))
    return [_piece(name, sources, converters, shapes, renamings) for name, sources in found.items()]


def _piece(
    name: str, sources: list[tuple[str, str | None]], converters: list[WeightConverter], shapes: Shapes,
    renamings: tuple[WeightRenaming, ...] = (),
) -> Piece:  # fmt: skip
    first, pattern = sources[0]
    if pattern is None:  # of several tensors with the same name at the end the first is taken
        return Piece(name, ((first, ""),), None, shapes, renamings)
    converter = next(rule for rule in reversed(converters) if pattern in rule.source_patterns)
    return Piece(name, tuple((key, pattern or key) for key, pattern in sources), converter, shapes, renamings)


def empty_like(tensor: Tensor) -> Tensor:
    """The same shape and type on the meta device; of a sharded tensor the whole's."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
