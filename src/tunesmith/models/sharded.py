"""A model that no process ever holds whole: built without weights, then filled with each process's own part of them.

model, checkpoint = empty_model(config, dtype)
with checkpoint.standing_in(model):
    method.adapt(model)
...                                     # tensor parallel, fully_shard: on the meta device
checkpoint.fill(model, device)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.config import ModelConfig
from tunesmith.models.conversion import Piece, empty_like, loading_pieces
from tunesmith.models.load import HeadKind, check_values, from_checkpoint, know_padding, load_config, model_source
from tunesmith.models.sibling import sibling
from tunesmith.models.tensor_files import TensorReader
from tunesmith.tensors import copy_part, own_part

OF_ADAPTERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""What PEFT puts into the names of the model's own weights."""


def why_whole(config: ModelConfig) -> str:
    """Why each process has to load the whole model (`load_model`) before it keeps its part of it; empty if it need not.

    Raises UserError if the checkpoint cannot be found.
    """
    architecture = load_config(config)
    if getattr(architecture, "quantization_config", None) is not None:
        return "its weights are unpacked on loading"
    if not weight_files(config, architecture):
        return "it has no *.safetensors, and other files cannot be read in part"
    return ""


def weight_files(config: ModelConfig, architecture: Any) -> list[Path]:
    """The checkpoint's safetensors files as transformers chooses them, downloaded if need be; none if it has none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    named = getattr(architecture, "transformers_weights", None)
    for name in [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        file = _file(config, name)
        if file is not None and not name.endswith(".index.json"):
            return [file]
        if file is not None:
            shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
            return [part for part in (_file(config, shard) for shard in shards) if part is not None]
    return []


def _file(config: ModelConfig, name: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        model_source(config), name, revision=config.revision or "main", _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found)


def empty_model(
    config: ModelConfig, dtype: torch.dtype, head: HeadKind = "language", num_labels: int = 0
) -> tuple[Any, Checkpoint]:
    """`load_model` without the weights, which are on the meta device until the checkpoint fills them in.

    What the checkpoint lacks is on the CPU already: buffers that are computed, and a value head that starts at random,
    with the same bits as `load_model` draws. Not for models with a reason in `why_whole`. Raises UserError as
    `load_model`.
    """
    before = torch.get_rng_state()
    model, new = from_checkpoint(config, dtype, head, num_labels, device_map={"": "meta"})
    torch.set_rng_state(before)  # some architectures draw numbers for what they then do not keep
    checkpoint = Checkpoint(model, weight_files(config, model.config))
    with checkpoint.standing_in(model):  # where a weight is decides which generator is drawn from
        _start(model, new)
    if head != "language":
        check_values(config, sibling(model))
        know_padding(config, model)
    return model, checkpoint


def _start(model: Any, new: set[str]) -> None:
    """Make what is in no checkpoint, by the model's own rules: parameters of these names, and computed buffers."""
    computed = [name for name, _ in model.named_non_persistent_buffers()]
    for name in [*new, *computed]:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if last in module._buffers:
            module._buffers[last] = torch.empty_like(module._buffers[last], device="cpu")
        else:
            module._parameters[last] = nn.Parameter(torch.empty_like(module._parameters[last], device="cpu"))
    for module in model.modules():  # a module may start what its children hold
        module._is_hf_initialized = False  # transformers' mark; weights that the checkpoint has keep theirs
    model.initialize_weights()


class Checkpoint:
    """The files behind a model, and how its parameters come from them."""

    def __init__(self, model: Any, files: Sequence[Path]) -> None:
        self.reader = TensorReader(files)
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self.pieces: dict[str, Piece] = {}
        for piece in loading_pieces(model, self.reader.shapes):
            shapes = {key: torch.empty(self.reader.shapes[key], device="meta") for key, _ in piece.sources}
            self.pieces |= dict.fromkeys(piece.run(shapes.__getitem__), piece)
        self._tie(model)
        self.own_names: dict[str, str] = {}
        for names in _by_tensor(model.named_parameters(remove_duplicate=False)):
            if found := [name for name in names if name in self.pieces]:
                self.own_names |= dict.fromkeys(names, found[0])
        self.own_names |= {name: name for name in self.pieces if name not in self.own_names}  # buffers

    def _tie(self, model: Any) -> None:
        """Tie weights of which the files have both copies, if they are equal, as transformers does where it sees them."""
        for target, source in list(model.all_tied_weights_keys.items()):
            mine, other = model.get_parameter(target), model.get_parameter(source)
            if mine is other:
                continue
            keys = [self.pieces[name].sources[0][0] for name in (target, source)]
            if self.reader.equal(*keys):
                _set(model, target, other)
            else:
                del model.all_tied_weights_keys[target]

    def own_name(self, name: str) -> str | None:
        """The name by which `pieces` know a tensor, adapters or not; None if no checkpoint has it."""
        return self.own_names.get(name, self.own_names.get(OF_ADAPTERS.sub("", name)))

    @contextmanager
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        """Inside, the empty weights look like weights on the CPU that take no memory.

        PEFT puts adapters where their layer's weight is: on the meta device they would lose the numbers they start with.
        Modules that PEFT copies take their memory until the end.
        """
        _replace(model, lambda _, p: torch.empty((), dtype=p.dtype).expand(p.shape) if p.is_meta else None)
        yield
        _replace(model, lambda name, p: empty_like(p) if self._is_filled(name, p) else None)

    def _is_filled(self, name: str, p: Tensor) -> bool:
        own = self.own_name(name)
        return own is not None and not p.is_meta

    @torch.no_grad()
    def fill(self, model: nn.Module, device: torch.device, buffers: torch.device | None = None) -> None:
        """Give memory on a device to what is still on the meta device, and read it: of sharded weights this rank's part.

        buffers: where buffers go, if elsewhere (weights that wait on the CPU). Nothing is sent between the ranks.
        """
        names = _names_of_empty(model)
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        for group in names:  # moving parts weights that were tied
            first = model.get_parameter(group[0]) if _is_parameter(model, group[0]) else None
            for name in group[1:] if first is not None else ():
                _set(model, name, first)
        wanted: dict[int, tuple[Piece, list[tuple[str, Tensor]]]] = {}
        for group in names:
            own = self.own_name(group[0])
            assert own is not None, f"neither the checkpoint nor the start of the model has {group[0]}"
            piece = self.pieces[own]
            wanted.setdefault(id(piece), (piece, []))[1].append((own, _get(model, group[0])))
        for piece, targets in wanted.values():
            self._fill_from(piece, targets)
        self.reader.close()
        for module in model.modules() if buffers is not None else ():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(buffers)

    def _fill_from(self, piece: Piece, targets: list[tuple[str, Tensor]]) -> None:
        """targets: (own name, tensor), all made of the same piece."""
        dtype = self.dtypes[piece.name]
        parts = [(own, *own_part(tensor)) for own, tensor in targets]
        if piece.converter is None:
            for _, local, runs in parts:
                self.reader.read(piece.sources[0][0], runs, local, dtype)
            return
        if piece.is_by_rows() and len(parts) == 1:  # experts: those of this rank alone
            ((own, local, (rows, *others)),) = parts
            if not local.numel():
                return
            made = piece.run(
                lambda key: self.reader.tensor(key, dtype),
                lambda n: any(start <= n < stop for start, stop in rows),
            )
            copy_part(made[own], [[(0, local.shape[0])], *others], local)
            return
        made = piece.run(lambda key: self.reader.tensor(key, dtype))
        for own, local, runs in parts:
            copy_part(made[own], runs, local)


def _names_of_empty(model: nn.Module) -> list[list[str]]:
    """Names of the tensors on the meta device; those of one tensor together."""
    everything = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return _by_tensor((name, tensor) for found in everything for name, tensor in found if tensor.is_meta)


def _by_tensor(named: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in named:
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _get(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name) if _is_parameter(model, name) else model.get_buffer(name)


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last in model.get_submodule(owner)._parameters


def _set(model: nn.Module, name: str, p: nn.Parameter | None) -> None:
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner)._parameters[last] = p


def _replace(model: nn.Module, make: Callable[[str, nn.Parameter], Tensor | None]) -> None:
    """Put `make(name, parameter)` in the place of parameters for which it is not None; tied ones stay tied."""
    for names in _by_tensor(model.named_parameters(remove_duplicate=False)):
        p = model.get_parameter(names[0])
        if (data := make(names[0], p)) is None:
            continue
        made: Any = nn.Parameter(data, requires_grad=p.requires_grad)
        made._is_hf_initialized = True  # transformers' mark: not to be drawn
        for name in names:
            _set(model, name, made)
