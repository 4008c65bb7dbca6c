"""Reading of sharded checkpoints of format 1, whose list of tensors is a pickle.

This format is no longer written. A pickle can run arbitrary code, so the unpickler accepts only the classes of such a
list, and its contents are checked. PyTorch reads the tensors with weights_only=True.
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
            return PurePath  # the original location, which is not used
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which does not belong in a checkpoint")


class PickledParts:
    """Named tensors, as in `TensorFiles`, from a directory written by torch.distributed.checkpoint."""

    def __init__(self, directory: Path) -> None:
        """Read the list of tensors.

        Raises:
            OSError: a file cannot be read.
            ValueError: the list is malformed, or the parts of a tensor do not cover its shape.
        """
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
            for index, storage in found.storage_data.items():
                begin = tuple(index.offset or (0,) * len(self.shapes[index.fqn]))
                size = sizes.pop((index.fqn, begin))
                file = inside(directory, storage.relative_path)
                if (
                    not 0
                    <= int(storage.offset)
                    <= int(storage.offset) + int(storage.length)
                    <= file.stat().st_size
                ):
                    raise ValueError(f"{index.fqn} is outside of {file}")
                chunk = (begin, size, file, int(storage.offset), int(storage.length))
                self._chunks.setdefault(index.fqn, []).append(chunk)
            if sizes:
                raise ValueError(f"{next(iter(sizes))[0]} is not stored")
            for name in entries:
                self._chunks[name].sort(key=lambda chunk: chunk[0])
                _check_cover(name, self.shapes[name], self._chunks[name])
        except OSError:
            raise
        except Exception as error:  # malformed bytes may raise any exception
            raise ValueError(f"{listed} is not the list of a sharded checkpoint: {one_line(error)}") from None

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """Read a tensor like `TensorFiles.read`."""
        parts = []
        for _, size, file, offset, length in self._chunks[name]:
            with file.open("rb") as stream:
                stream.seek(offset)
                data = io.BytesIO(stream.read(length))
            try:
                part = torch.load(data, map_location="cpu", weights_only=True)
            except Exception as error:  # malformed bytes may raise any exception
                raise ValueError(f"{file} does not contain {name}: {one_line(error)}") from None
            if not isinstance(part, Tensor) or tuple(part.shape) != size or part.dtype != self.dtypes[name]:
                raise ValueError(f"{file} does not contain {name} with the listed shape and dtype")
            parts.append(part)
        if not self.shapes[name]:
            return parts[0]
        first, last = rows_of(self.shapes[name], like)
        return torch.cat(parts)[first:last].clone()


def _check_cover(name: str, shape: tuple[int, ...], chunks: list[Any]) -> None:
    """Raise ValueError unless the chunks are consecutive and cover all rows of the tensor."""
    row = 0
    for begin, size, *_ in chunks:
        if shape and (begin[0] != row or any(begin[1:]) or size[1:] != shape[1:]):
            raise ValueError(f"the parts of {name} do not cover its shape")
        row += size[0] if shape else 0
    if (shape and row != shape[0]) or (not shape and len(chunks) != 1):
        raise ValueError(f"the parts of {name} do not cover its shape")
