"""Sharded checkpoints of format 1, which are no longer written: their list of tensors is a pickle.

A pickle can run any code. Here it may name only what such a list is made of, and is then checked; the tensors PyTorch
reads with weights_only=True.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from fastgpt.atomic_io import inside
from fastgpt.checkpoints.tensor_files import rows_of
from fastgpt.console import one_line

_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        metadata,
        ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
         "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": (filesystem, ("_StorageInfo",)),
    "torch.serialization": (torch.serialization, ("_get_layout",)),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        owner, names = _CLASSES.get(module, (None, ()))
        if name in names:
            return getattr(owner, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where it was written, which nobody reads
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint")


class PickledParts:
    """Named tensors, as in `TensorFiles`, from a directory that torch.distributed.checkpoint has written."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError for a malformed list, and for parts that do not make up the shape of their tensor."""
        listed = directory / ".metadata"
        try:
            with listed.open("rb") as stream:
                found = _Unpickler(stream).load()
            entries = {str(name): facts for name, facts in found.state_dict_metadata.items()}
            self.shapes = {name: tuple(map(int, facts.size)) for name, facts in entries.items()}
            self.dtypes: dict[str, torch.dtype | None] = {
                name: facts.properties.dtype for name, facts in entries.items()
            }
            self._chunks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], Path, int, int]]] = {}
            sizes = {
                (name, tuple(c.offsets)): tuple(c.sizes)
                for name, facts in entries.items()
                for c in facts.chunks
            }
            for index, place in found.storage_data.items():
                begin = tuple(index.offset or (0,) * len(self.shapes[index.fqn]))
                size = sizes.pop((index.fqn, begin))
                file = inside(directory, place.relative_path)
                if not 0 <= int(place.offset) <= int(place.offset) + int(place.length) <= file.stat().st_size:
                    raise ValueError(f"{index.fqn} lies outside of {file}")
                chunk = (begin, size, file, int(place.offset), int(place.length))
                self._chunks.setdefault(index.fqn, []).append(chunk)
            if sizes:
                raise ValueError(f"{next(iter(sizes))[0]} is not stored")
            for name in entries:
                self._chunks[name].sort(key=lambda chunk: chunk[0])
                _check_cover(name, self.shapes[name], self._chunks[name])
        except OSError:
            raise
        except Exception as error:  # malformed bytes may raise any
            raise ValueError(f"{listed} is not the list of a sharded checkpoint: {one_line(error)}") from None

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """As `TensorFiles.read`."""
        parts = []
        for _, size, file, offset, length in self._chunks[name]:
            with file.open("rb") as stream:
                stream.seek(offset)
                data = io.BytesIO(stream.read(length))
            try:
                part = torch.load(data, map_location="cpu", weights_only=True)
            except Exception as error:  # malformed bytes may raise any
                raise ValueError(f"{file} does not hold {name}: {one_line(error)}") from None
            if not isinstance(part, Tensor) or tuple(part.shape) != size or part.dtype != self.dtypes[name]:
                raise ValueError(f"{file} does not hold {name} as its list says")
            parts.append(part)
        if not self.shapes[name]:
            return parts[0]
        first, last = rows_of(self.shapes[name], like)
        return torch.cat(parts)[first:last].clone()


def _check_cover(name: str, shape: tuple[int, ...], chunks: list[Any]) -> None:
    """Raise ValueError unless the chunks are all rows of the tensor, one behind the other."""
    row = 0
    for begin, size, *_ in chunks:
        if shape and (begin[0] != row or any(begin[1:]) or size[1:] != shape[1:]):
            raise ValueError(f"the parts of {name} do not fit")
        row += size[0] if shape else 0
    if (shape and row != shape[0]) or (not shape and len(chunks) != 1):
        raise ValueError(f"the parts of {name} do not fit")
