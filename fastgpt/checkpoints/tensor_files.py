"""Named tensors in safetensors files, complete or in parts; shapes are read first, tensors on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFiles:
    """Tensors of one or several safetensors files.

    A tensor that occurs in several files is their concatenation along the first dimension, in the order of the files.
    This is how the processes of a sharded run write it.

    Attributes:
        shapes: shape of each tensor, by name.
        dtypes: dtype of each tensor, by name; None if it is not floating point.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the headers; safetensors compares them with the sizes of the files.

        Raises:
            ValueError: a file is damaged, or parts of a tensor do not match.
            OSError: a file cannot be read.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}
        self._parts: dict[str, list[tuple[Path, int]]] = {}  # files with their numbers of rows
        for file in files:
            for name, shape, dtype in _header(file):
                rows = shape[0] if shape else 0
                if name not in self.shapes:
                    self.shapes[name], self.dtypes[name], self._parts[name] = shape, dtype, []
                else:
                    before = self.shapes[name]
                    if not shape or before[1:] != shape[1:] or self.dtypes[name] != dtype:
                        raise ValueError(
                            f"{file} does not match the other parts: {name} is {shape} of {dtype}"
                        )
                    self.shapes[name] = (before[0] + rows, *shape[1:])
                self._parts[name].append((file, rows))

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """Read a tensor to the CPU.

        If `like` is sharded and has the same shape, only the rows that this process owns of it are read.
        """
        first, last = rows_of(self.shapes[name], like)
        read, begin = [], 0
        for file, rows in self._parts[name]:
            low, high = max(first, begin), min(last, begin + rows)
            with safe_open(file, framework="pt") as tensors:
                if low == begin and high == begin + rows:
                    read.append(tensors.get_tensor(name))
                elif low < high:
                    read.append(tensors.get_slice(name)[low - begin : high - begin])
            begin += rows
        if len(read) == 1:
            return read[0]
        return torch.cat(read) if read else torch.empty(0, *self.shapes[name][1:], dtype=self.dtypes[name])


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError if it cannot be written."""
    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _header(file: Path) -> list[tuple[str, tuple[int, ...], torch.dtype | None]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            views: list[tuple[str, Any]] = [(name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118
            return [(name, tuple(v.get_shape()), _DTYPES.get(v.get_dtype())) for name, v in views]
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from None


def rows_of(shape: tuple[int, ...], like: Tensor | None) -> tuple[int, int]:
    """Return the first row that this process owns of `like`, and the end of its rows.

    FSDP2 splits rows like torch.chunk.
    """
    from torch.distributed.tensor import DTensor, Shard

    rows = shape[0] if shape else 0
    if not isinstance(like, DTensor) or tuple(like.shape) != shape:
        return 0, rows
    assert like.placements == (Shard(0),), like.placements
    size = -(-rows // like.device_mesh.size())
    first = min(rows, like.device_mesh.get_local_rank() * size)
    return first, min(rows, first + size)
