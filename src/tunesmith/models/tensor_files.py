"""Tensors in safetensors files: parts of them read, and whole ones written one by one, so that no file is ever held whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from tunesmith.tensors import Runs

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""How safetensors spells the types of numbers that a model trains and computes with."""

PIECE_BYTES = 2**24
"""At most so much is looked at, at a time (one row, if that is more)."""
WINDOW_BYTES = 2**26
"""A mapped file's pages count as this process's memory until it is closed: so much is read before it is opened anew."""


class TensorReader:
    """Reads parts of the tensors in some safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with _opened(file) as content:
                for key in content.keys():  # noqa: SIM118 (no mapping)
                    self.file_of[key] = file
                    self.shapes[key] = tuple(content.get_slice(key).get_shape())
        self._open: Path | None = None
        self._content: Any = None
        self._stack = ExitStack()
        self._seen = 0

    def read(self, key: str, runs: Runs, into: Tensor, dtype: torch.dtype) -> None:
        """Copy a part of a tensor into one of that part's shape, first rounded to `dtype`, then to the type of `into`."""
        for place, part in self._pieces(key, runs):
            into[place].copy_(part.to(dtype))

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        """A whole tensor, rounded to `dtype`."""
        whole = torch.empty(self.shapes[key], dtype=dtype)
        self.read(key, [[(0, size)] for size in whole.shape], whole, dtype)
        return whole

    def equal(self, key: str, other: str) -> bool:
        """Whether two tensors are the same."""
        if self.shapes[key] != self.shapes[other]:
            return False
        whole = [[(0, size)] for size in self.shapes[key]]
        pieces = zip(self._pieces(key, whole), self._pieces(other, whole), strict=True)
        return all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in pieces)

    def close(self) -> None:
        self._stack.close()
        self._open, self._content, self._seen = None, None, 0

    def _pieces(self, key: str, runs: Runs) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """(where it goes in the part, a view of the file)."""
        shape = self.shapes[key]
        if not shape:
            yield (), self._at(key, 0).get_tensor(key)
            return
        itemsize = self._at(key, 0).get_slice(key)[:0].element_size()
        row_bytes = max(1, itemsize * torch.Size(shape[1:]).numel())
        rows = max(1, PIECE_BYTES // row_bytes)
        split = [(at, min(at + rows, stop)) for start, stop in runs[0] for at in range(start, stop, rows)]
        for box in product(_placed(split), *map(_placed, runs[1:])):
            piece = tuple(slice(start, stop) for _, start, stop in box)
            place = tuple(slice(at, at + stop - start) for at, start, stop in box)
            content = self._at(key, (piece[0].stop - piece[0].start) * row_bytes)
            yield place, content.get_slice(key)[piece]

    def _at(self, key: str, num_bytes: int) -> Any:
        """The open file that holds a tensor, of which so much is looked at now."""
        file = self.file_of[key]
        if self._open != file or self._seen + num_bytes > WINDOW_BYTES:
            self.close()
            self._content, self._open = self._stack.enter_context(_opened(file)), file
        self._seen += num_bytes
        return self._content


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def _placed(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(where it starts when they are laid end to end, start, stop) of stretches."""
    placed, at = [], 0
    for start, stop in stretches:
        placed.append((at, start, stop))
        at += stop - start
    return placed


class TensorWriter:
    """Writes a safetensors file whose tensors come one at a time, in any order; it is whole when all have come."""

    def __init__(self, file: Path, like: Mapping[str, Tensor]) -> None:
        """like: tensors of the names, shapes and types that will be written, such as those on the meta device."""
        # widest numbers first, as safetensors itself does: each tensor then starts at a multiple of its numbers' size
        names = sorted(like, key=lambda name: (-like[name].element_size(), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.start: dict[str, int] = {}
        end = 0
        for name in names:
            tensor = like[name]
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
            }  # fmt: skip
            self.start[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.base = 8 + len(text)
        self._file = file.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """A tensor on the CPU."""
        self._file.seek(self.base + self.start[name])
        if tensor.numel():
            self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
