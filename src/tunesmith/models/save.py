"""The final model as ordinary files, written by all ranks together, none of which ever holds it whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.models.conversion import Piece, empty_like, saving_pieces
from tunesmith.models.tensor_files import NAMES, TensorWriter
from tunesmith.tensors import from_all, whole

FILE_BYTES = 5 * 10**9
"""At most so much goes into a file (one tensor, if that is more)."""
INDEX = "model.safetensors.index.json"


@torch.no_grad()
def save_sharded(model: Any, folder: Path, rank: int, world: int, file_bytes: int = FILE_BYTES) -> None:
    """What `model.save_pretrained(folder)` writes: the same names, shapes, types and bits, in smaller files.

    All ranks call it, with a folder that all of them see. Tensors are gathered one after another, and each goes at once
    into its file, which one rank writes. Where a file cannot be written all ranks raise UserError.
    """
    tensors = dict(model.state_dict(keep_vars=True))
    plan = _plan(model, file_bytes)
    _agree(folder, _trouble(_prepare, model, folder) if rank == 0 else "", world)
    mine = {file for n, file in enumerate(plan.files) if n % world == rank}
    trouble = ""
    with ExitStack() as opened:
        writers: dict[str, TensorWriter] = {}
        for piece, names in plan.pieces:
            gathered = {key: whole(tensors[key]) for key, _ in piece.sources}
            own = [name for name in names if plan.file_of[name] in mine]
            if own and not trouble:  # in trouble too: the others wait for this rank's part of the next tensor
                made = piece.run(partial(_on_cpu, gathered))
                trouble = _trouble(_write, folder, plan, {name: made[name] for name in own}, writers, opened)
                del made
            del gathered  # before the next is gathered
    if rank == 0 and plan.index and not trouble:
        text = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        trouble = _trouble((folder / INDEX).write_text, text, "utf-8")
    _agree(folder, trouble, world)


def _agree(folder: Path, trouble: str, world: int) -> None:
    """Raises UserError on all ranks if one is in trouble."""
    told = from_all(trouble) if world > 1 else [trouble]
    if failed := [f"rank {rank}: {said}" if world > 1 else said for rank, said in enumerate(told) if said]:
        raise UserError(f"{folder}: the model cannot be saved: {'; '.join(failed)}; free some space, or mend the disk")


def _trouble(write: Callable[..., Any], *arguments: Any) -> str:
    """Write; returns what went wrong on the disk, empty if nothing."""
    try:
        write(*arguments)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _prepare(model: Any, folder: Path) -> None:
    """Everything but the weights, in a folder without those of an earlier save."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    model.save_pretrained(folder, state_dict={})


def _on_cpu(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[name].detach().cpu()


@dataclass(frozen=True)
class _Plan:
    pieces: list[tuple[Piece, list[str]]]
    """With the names of what each gives."""
    files: dict[str, dict[str, Tensor]]
    """What is in each, on the meta device."""
    file_of: dict[str, str]
    index: dict[str, Any] = field(default_factory=dict)
    """Of several files."""


def can_save_by_tensor(model: Any) -> bool:
    """Whether all that is saved are tensors of common types."""
    return all(isinstance(x, Tensor) and x.dtype in NAMES for x in model.state_dict(keep_vars=True).values())


def pieces_of(model: Any) -> list[Piece]:
    """How the tensors of its files are made, one after another."""
    return saving_pieces(model, _empty(model))


def _empty(model: Any) -> dict[str, Tensor]:
    """What is saved of a model, without numbers."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(model._keys_to_ignore_on_save or ())
    kept = {name: x for name, x in model.state_dict(keep_vars=True).items() if name not in ignored}
    return remove_tied_weights_from_state_dict({name: empty_like(x) for name, x in kept.items()}, model)


def _plan(model: Any, file_bytes: int) -> _Plan:
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = _empty(model)
    pieces: list[tuple[Piece, list[str]]] = []
    results: dict[str, Tensor] = {}
    for piece in saving_pieces(model, empty):
        made = piece.run(empty.__getitem__)
        pieces.append((piece, list(made)))
        results |= made
    split = split_torch_state_dict_into_shards(
        results, filename_pattern="model{suffix}.safetensors", max_shard_size=file_bytes
    )
    files = {file: {name: results[name] for name in names} for file, names in split.filename_to_tensors.items()}
    file_of = {name: file for file, names in files.items() for name in names}
    if not split.is_sharded:
        return _Plan(pieces, files, file_of)
    metadata = {"total_parameters": model.num_parameters(), **split.metadata}
    return _Plan(pieces, files, file_of, {"metadata": metadata, "weight_map": file_of})


def _write(
    folder: Path, plan: _Plan, tensors: dict[str, Tensor], writers: dict[str, TensorWriter], opened: ExitStack
) -> None:
    for name, tensor in tensors.items():
        file = plan.file_of[name]
        if file not in writers:
            writers[file] = opened.enter_context(TensorWriter(folder / file, plan.files[file]))
        writers[file].write(name, tensor)


@torch.no_grad()
def save_adapter(peft_model: Any, folder: Path, rank: int) -> None:
    """What `peft_model.save_pretrained(folder)` writes, of sharded parameters. All ranks call it, rank 0 writes."""
    from peft import get_peft_model_state_dict

    tensors = dict(peft_model.state_dict(keep_vars=True))
    empty = {name: empty_like(tensor) for name, tensor in tensors.items()}
    chosen = {id(tensor) for tensor in get_peft_model_state_dict(peft_model, state_dict=dict(empty)).values()}
    gathered: dict[str, Tensor] = {}
    for name, tensor in empty.items():
        if id(tensor) in chosen:
            full = whole(tensors[name]).detach()
            gathered |= {name: full.cpu()} if rank == 0 else {}
    if rank == 0:
        peft_model.save_pretrained(folder, state_dict=gathered)
