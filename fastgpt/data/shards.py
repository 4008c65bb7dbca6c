"""Prepared data sets: tokens on the disk, whole or absent, read through a memory map.

    DIR/train-00000.npy        token ids, 1-D uint16, or uint32 where the vocabulary is larger than 65536;
                               behind each document stands the tokenizer's end of text
        train-00000.ends.npy   int64: where each document ends in this shard, its end of text included
        val-00000.npy …
        tokenizer.json
        dataset.json           format, tokenizer, dtype, seed, report, and size and SHA-256 of the files above

A document lies in one shard. All of it is written into a temporary sibling, flushed to the disk, and takes its
name by a rename: a process that is killed, or a full disk, leaves no half data set, and the one that was to be
overwritten stays until the new one is whole.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.atomic_io import (
    AtomicDirectory,
    check_files,
    check_outside_checkpoints,
    check_own,
    fingerprint,
    remove_own,
)
from fastgpt.data.description import FORMAT, SPLITS, map_array, read_description, token_dtype
from fastgpt.json_io import dumps
from fastgpt.tokenizer import FILE, Tokenizer, load_tokenizer

SHARD_TOKENS = 1 << 27  # a shard is closed behind the document that reaches so many: 256 MiB of uint16
_STATE = "dataset.json"
_OWN = re.compile(r"(train|val)-\d{5,}(\.ends)?\.npy|tokenizer\.json|dataset\.json")
_HEADER = 128  # bytes before the tokens


class DatasetError(ValueError):
    """There is no prepared data set, or it is not whole; the message says which."""


class TokenSplit:
    """One split of a data set: a long run of tokens, of which only what is read comes into memory.

    Attributes:
        document_ends: (documents,) int64 array; document i is [ends[i - 1], ends[i]), its end of text included.
    """

    def __init__(self, shards: list[npt.NDArray[Any]], ends: list[npt.NDArray[np.int64]]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])  # of each shard, and the end of the last
        self.document_ends: npt.NDArray[np.int64] = np.concatenate(
            [np.empty(0, np.int64), *(e + start for e, start in zip(ends, self._starts, strict=False))]
        )

    def __len__(self) -> int:
        """Tokens, ends of text included."""
        return int(self._starts[-1])

    def __getitem__(self, part: slice) -> Tensor:
        """Tokens start to stop, (stop - start,) int64, a copy. Raises IndexError for what is not in the split."""
        start = 0 if part.start is None else part.start
        stop = len(self) if part.stop is None else part.stop
        if part.step is not None or not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} are not among the {len(self)} of this split")
        out = np.empty(stop - start, np.int64)
        shard = int(np.searchsorted(self._starts, start, "right")) - 1
        place = start
        while place < stop:
            end = min(stop, int(self._starts[shard + 1]))
            first = int(self._starts[shard])
            out[place - start : end - start] = self._shards[shard][place - first : end - first]
            place, shard = end, shard + 1
        return torch.from_numpy(out)


class TokenDataset:
    """A prepared data set, open for reading.

    Attributes:
        path: its directory.
        facts: what dataset.json says: "tokenizer", "vocab_size", "dtype", "seed", "splits", "report".
    """

    def __init__(
        self,
        path: Path,
        facts: dict[str, Any],
        splits: dict[str, TokenSplit],
        tokenizer: Tokenizer,
    ) -> None:
        self.path = path
        self.facts = facts
        self._splits = splits
        self._tokenizer = tokenizer

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return self._tokenizer

    def split(self, name: str) -> TokenSplit:
        """ "train" or "val". Raises DatasetError for another, and for one without tokens."""
        if name not in self._splits:
            raise DatasetError(f"{self.path} has no split {name!r}; it has {', '.join(self._splits)}")
        split = self._splits[name]
        if len(split) == 0:
            raise DatasetError(f"the split {name!r} of {self.path} holds no document")
        return split


def is_dataset(path: str | Path) -> bool:
    """Whether a directory is a prepared data set, a finished one."""
    return (Path(path) / _STATE).is_file()


def open_dataset(path: str | Path, verify: bool = True) -> TokenDataset:
    """The data set in a directory that `fastgpt data` wrote.

    Sizes are always compared with dataset.json. `verify` reads every file once (about a second a GB): SHA-256, and
    that no token id is beyond the vocabulary.

    Raises DatasetError where there is none, or one that is unfinished, cut short, altered or foreign.
    """
    path = Path(path)
    if not path.is_dir():
        raise DatasetError(f"there is no data set directory {path}")
    if not is_dataset(path):
        raise DatasetError(
            f"{path} has no {_STATE}: it is no prepared data set, or was not finished; run fastgpt data"
        )
    try:
        facts = read_description(path / _STATE)
        shards = [shard["name"] for split in facts["splits"].values() for shard in split["shards"]]
        expected = {FILE, *(f"{name}{end}" for name in shards for end in (".npy", ".ends.npy"))}
        check_files(path, facts["files"], expected, _STATE, contents=verify)
        tokenizer = load_tokenizer(path)
        for name in ("vocab_size", "end_of_text"):
            if facts[name] != getattr(tokenizer, name):
                raise ValueError(f"{path / _STATE} says {name} {facts[name]}, unlike {path / FILE}")
        splits = {name: _read_split(path, facts, name, verify) for name in SPLITS}
    except (OSError, ValueError) as error:
        raise DatasetError(str(error)) from None
    return TokenDataset(path, facts, splits, tokenizer)


def _read_split(path: Path, facts: dict[str, Any], name: str, verify: bool) -> TokenSplit:
    """The tokens, mapped, and the documents' ends of each shard; if `verify`, every id is in the vocabulary."""
    tokens, ends = [], []
    for shard in facts["splits"][name]["shards"]:
        file = path / f"{shard['name']}.npy"
        mapped = map_array(file, np.dtype(facts["dtype"]), shard["tokens"])
        end = map_array(file.with_suffix(".ends.npy"), np.dtype(np.int64), shard["documents"])
        if end[0] <= 0 or (end[1:] <= end[:-1]).any() or end[-1] != len(mapped):
            raise ValueError(f"{file.with_suffix('.ends.npy')} does not part the tokens of {file.name}")
        if verify and mapped.max() >= facts["vocab_size"]:
            raise ValueError(
                f"{file} holds the token {mapped.max()}, and the vocabulary has {facts['vocab_size']} tokens"
            )
        tokens.append(mapped)
        ends.append(end)
    return TokenSplit(tokens, ends)


class DatasetWriter:
    """Writes a data set document by document, in memory that does not grow but for 8 bytes a document of a shard.

    Use it in a `with` block, and call `finish` last; a block that is left without it leaves nothing.
    """

    def __init__(
        self,
        out: str | Path,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        shard_tokens: int = SHARD_TOKENS,
        overwrite: bool = False,
    ) -> None:
        """`seed` is written down, no more. Raises FileExistsError where `out` holds a data set that is not to be
        overwritten, or anything else, and ValueError for a tokenizer without an end of text.
        """
        self._out = Path(out).resolve()
        self._overwrite = overwrite
        self._old = self._out.with_name(f".writing-{self._out.name}.old")
        check_destination(self._out, overwrite)
        if tokenizer.end_of_text is None:
            raise ValueError("the tokenizer has no end of text, which has to part documents; take another")
        self._end_of_text = tokenizer.end_of_text
        self._vocab_size = tokenizer.vocab_size
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._shard_tokens = shard_tokens
        self._facts: dict[str, Any] = {
            "format": FORMAT,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "dtype": self._dtype.name,
            "seed": seed,
            "splits": {name: {"tokens": 0, "documents": 0, "shards": []} for name in SPLITS},
        }
        self._open: dict[str, _Shard] = {}
        self._finished = False
        self._writing = AtomicDirectory(self._out, _OWN)
        try:
            self._recover()
            check_destination(self._out, overwrite)
        except BaseException:
            self._writing.discard()
            self._writing.unlock()
            raise
        self._temporary = self._writing.path
        self._tokenizer = tokenizer

    def _recover(self) -> None:
        """Undo what a process that died between the renames of `finish`, or after them, has left."""
        if os.path.lexists(self._old) and not self._out.exists():
            check_own(self._old, _OWN)
            self._old.rename(self._out)
        remove_own(self._old, _OWN)

    def add(self, split: str, tokens: npt.ArrayLike) -> None:
        """Append a document, ids (N,) without an end of text. Raises ValueError for an id that is none of a text, and
        OSError if the disk is full.
        """
        ids = np.asarray(tokens, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(f"a document holds a token id outside the vocabulary [0, {self._vocab_size})")
        if (ids == self._end_of_text).any():
            raise ValueError("a document holds the end of text, which is to stand behind it alone")
        with self._sentence():
            if split not in self._open:
                number = len(self._facts["splits"][split]["shards"])
                self._open[split] = _Shard(self._temporary / f"{split}-{number:05d}.npy", self._dtype)
            self._open[split].add(np.append(ids, self._end_of_text))
            if self._open[split].tokens >= self._shard_tokens:
                self._close(split)

    def finish(self, report: dict[str, Any]) -> Path:
        """Write dataset.json, with whatever else JSON can hold as its "report", and give the directory its name."""
        with self._sentence():
            for split in list(self._open):
                self._close(split)
            self._tokenizer.save(self._temporary)
            files = sorted(self._temporary.iterdir())
            self._facts |= {"report": report, "files": {file.name: fingerprint(file) for file in files}}
            (self._temporary / _STATE).write_text(dumps(self._facts, indent=1), "utf-8")
            check_destination(self._out, self._overwrite)
            if is_dataset(self._out):
                self._out.rename(self._old)
            self._writing.publish()
            self._finished = True
            with suppress(OSError):
                remove_own(self._old, _OWN)
        return self._out

    def _close(self, split: str) -> None:
        entry = self._open.pop(split).close()
        facts = self._facts["splits"][split]
        facts["tokens"] += entry["tokens"]
        facts["documents"] += entry["documents"]
        facts["shards"].append(entry)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for shard in self._open.values():
            shard.abandon()
        if not self._finished:
            self._writing.discard()
        self._writing.unlock()

    @contextmanager
    def _sentence(self) -> Iterator[None]:
        """Say of a full disk what was being written, and what became of it."""
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            raise OSError(
                f"the data set {self._out} could not be written ({error.strerror or error}); nothing of it remains"
            ) from error


def check_destination(out: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless a data set may be written to `out`: a new or empty directory, or, to overwrite, a
    data set and nothing else; ValueError inside a run's checkpoint.
    """
    check_outside_checkpoints(out)
    if is_dataset(out):
        if not overwrite:
            raise FileExistsError(f"{out} holds a prepared data set already; give --overwrite to replace it")
        check_own(out.resolve(), _OWN)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and is no prepared data set; name another directory")


class _Shard:
    """A shard being written; its number of tokens, which the header holds, is known last."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.tokens = 0
        self._path = path
        self._dtype = dtype
        self._ends = array("q")
        self._file: BinaryIO = path.open("wb")
        self._file.write(bytes(_HEADER))

    def add(self, tokens: npt.NDArray[np.int64]) -> None:
        self._file.write(tokens.astype(self._dtype).tobytes())
        self.tokens += len(tokens)
        self._ends.append(self.tokens)

    def close(self) -> dict[str, Any]:
        self._file.seek(0)
        self._file.write(_npy_header(self._dtype, self.tokens))
        self._file.close()
        np.save(self._path.with_suffix(".ends.npy"), np.frombuffer(self._ends, np.int64))
        return {"name": self._path.stem, "tokens": self.tokens, "documents": len(self._ends)}

    def abandon(self) -> None:
        with suppress(OSError):  # what is still in the buffer may not fit the disk, and is not wanted
            self._file.close()


def _npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """The _HEADER bytes before a 1-D array in NumPy's format 1.0 (numpy.lib.format)."""
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    magic = np.lib.format.magic(1, 0)
    text = repr(fields).ljust(_HEADER - len(magic) - 3) + "\n"
    return bytes(magic) + len(text).to_bytes(2, "little") + text.encode("ascii")
