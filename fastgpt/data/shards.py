"""Prepared data sets: shards of tokens on disk, complete or absent, read through memory maps.

    DIR/train-00000.npy        token ids, 1-D uint16, or uint32 for a vocabulary of more than 65536 tokens;
                               each document ends with the tokenizer's end of text
        train-00000.ends.npy   int64: the end of each document in this shard, its end of text included
        val-00000.npy …
        tokenizer.json
        dataset.json           format, tokenizer, dtype, seed, report, and size and SHA-256 of the files above

A document is never split between shards. All files are written to a temporary sibling directory and flushed to disk;
then the directory is renamed. A killed process or a full disk therefore leaves no partial data set, and an overwritten
data set stays until the new one is complete.
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

SHARD_TOKENS = 1 << 27  # 256 MiB of uint16; a shard is closed after the document that reaches this size
_STATE = "dataset.json"
_OWN = re.compile(r"(train|val)-\d{5,}(\.ends)?\.npy|tokenizer\.json|dataset\.json")
_HEADER = 128  # bytes before the tokens


class DatasetError(ValueError):
    """Error for a directory without a complete prepared data set."""


class TokenSplit:
    """One split of a data set: tokens that are loaded from disk on access.

    Attributes:
        document_ends: (documents,) int64 array; document i is [ends[i - 1], ends[i]), its end of text included.
    """

    def __init__(self, shards: list[npt.NDArray[Any]], ends: list[npt.NDArray[np.int64]]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])  # start of each shard, and the end of the last
        self.document_ends: npt.NDArray[np.int64] = np.concatenate(
            [np.empty(0, np.int64), *(e + start for e, start in zip(ends, self._starts, strict=False))]
        )

    def __len__(self) -> int:
        """Return the number of tokens, ends of text included."""
        return int(self._starts[-1])

    def __getitem__(self, part: slice) -> Tensor:
        """Copy tokens start to stop, (stop - start,) int64.

        Raises:
            IndexError: the slice exceeds the split or has a step.
        """
        start = 0 if part.start is None else part.start
        stop = len(self) if part.stop is None else part.stop
        if part.step is not None or not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"tokens {start} to {stop} are outside this split of {len(self)} tokens, or the slice has a step"
            )
        out = np.empty(stop - start, np.int64)
        shard = int(np.searchsorted(self._starts, start, "right")) - 1
        position = start
        while position < stop:
            end = min(stop, int(self._starts[shard + 1]))
            first = int(self._starts[shard])
            out[position - start : end - start] = self._shards[shard][position - first : end - first]
            position, shard = end, shard + 1
        return torch.from_numpy(out)


class TokenDataset:
    """A prepared data set, open for reading.

    Attributes:
        path: its directory.
        facts: contents of dataset.json: "tokenizer", "vocab_size", "dtype", "seed", "splits", "report".
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
        """Return the tokenizer of the data set."""
        return self._tokenizer

    def split(self, name: str) -> TokenSplit:
        """Return the split "train" or "val".

        Raises:
            DatasetError: there is no such split, or it is empty.
        """
        if name not in self._splits:
            raise DatasetError(f"{self.path} has no split {name!r}; it has {', '.join(self._splits)}")
        split = self._splits[name]
        if len(split) == 0:
            raise DatasetError(f"the split {name!r} of {self.path} is empty; prepare a larger data set")
        return split


def is_dataset(path: str | Path) -> bool:
    """Return True if a directory contains a complete prepared data set."""
    return (Path(path) / _STATE).is_file()


def open_dataset(path: str | Path, verify: bool = True) -> TokenDataset:
    """Open a data set that `fastgpt data` wrote.

    Args:
        path: its directory.
        verify: read every file (about one second per GB) and check its SHA-256 and that token ids are in the
            vocabulary. File sizes are always checked.

    Raises:
        DatasetError: the directory contains no data set, or one that is incomplete, truncated, altered or foreign.
    """
    path = Path(path)
    if not path.is_dir():
        raise DatasetError(f"data set directory {path} does not exist")
    if not is_dataset(path):
        raise DatasetError(
            f"{path} has no {_STATE}: it is not a prepared data set, or is incomplete; run fastgpt data"
        )
    try:
        facts = read_description(path / _STATE)
        shards = [shard["name"] for split in facts["splits"].values() for shard in split["shards"]]
        expected = {FILE, *(f"{name}{end}" for name in shards for end in (".npy", ".ends.npy"))}
        check_files(path, facts["files"], expected, _STATE, contents=verify)
        tokenizer = load_tokenizer(path)
        for name in ("vocab_size", "end_of_text"):
            if facts[name] != getattr(tokenizer, name):
                raise ValueError(
                    f"{path / _STATE} has {name} {facts[name]}, unlike {path / FILE}; run fastgpt data again"
                )
        splits = {name: _read_split(path, facts, name, verify) for name in SPLITS}
    except (OSError, ValueError) as error:
        raise DatasetError(str(error)) from None
    return TokenDataset(path, facts, splits, tokenizer)


def _read_split(path: Path, facts: dict[str, Any], name: str, verify: bool) -> TokenSplit:
    """Map the tokens and the document ends of each shard; `verify` checks that ids are in the vocabulary."""
    tokens, ends = [], []
    for shard in facts["splits"][name]["shards"]:
        file = path / f"{shard['name']}.npy"
        mapped = map_array(file, np.dtype(facts["dtype"]), shard["tokens"])
        end = map_array(file.with_suffix(".ends.npy"), np.dtype(np.int64), shard["documents"])
        if end[0] <= 0 or (end[1:] <= end[:-1]).any() or end[-1] != len(mapped):
            raise ValueError(
                f"{file.with_suffix('.ends.npy')} does not match the tokens of {file.name}; run fastgpt data again"
            )
        if verify and mapped.max() >= facts["vocab_size"]:
            raise ValueError(
                f"{file} contains the token {mapped.max()}, but the vocabulary has {facts['vocab_size']} tokens"
            )
        tokens.append(mapped)
        ends.append(end)
    return TokenSplit(tokens, ends)


class DatasetWriter:
    """Writer of a data set, one document at a time.

    Memory is constant except for 8 bytes per document of the open shard. Use it in a `with` block and call `finish`
    last; a block that ends without `finish` leaves no files.
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
        """Check the destination and open a temporary directory.

        Args:
            out: directory of the data set.
            tokenizer: the tokenizer of the documents.
            seed: recorded in dataset.json, otherwise unused.
            shard_tokens: a shard is closed after the document that reaches this number of tokens.
            overwrite: replace an existing data set.

        Raises:
            FileExistsError: `out` contains a data set and overwrite is False, or `out` contains anything else.
            ValueError: the tokenizer has no end-of-text token.
        """
        self._out = Path(out).resolve()
        self._overwrite = overwrite
        self._old = self._out.with_name(f".writing-{self._out.name}.old")
        check_destination(self._out, overwrite)
        if tokenizer.end_of_text is None:
            raise ValueError("the tokenizer has no end of text to separate documents; use another tokenizer")
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
        """Undo the partial renames of a process that was killed in `finish`."""
        if os.path.lexists(self._old) and not self._out.exists():
            check_own(self._old, _OWN)
            self._old.rename(self._out)
        remove_own(self._old, _OWN)

    def add(self, split: str, tokens: npt.ArrayLike) -> None:
        """Append a document.

        Args:
            split: "train" or "val".
            tokens: (N,), its token ids without an end of text.

        Raises:
            ValueError: an id is outside the vocabulary or is the end of text.
            OSError: the disk is full.
        """
        ids = np.asarray(tokens, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(f"a document contains a token id outside the vocabulary [0, {self._vocab_size})")
        if (ids == self._end_of_text).any():
            raise ValueError("a document contains the end of text; pass it without, it is appended")
        with self._described_errors():
            if split not in self._open:
                number = len(self._facts["splits"][split]["shards"])
                self._open[split] = _Shard(self._temporary / f"{split}-{number:05d}.npy", self._dtype)
            self._open[split].add(np.append(ids, self._end_of_text))
            if self._open[split].tokens >= self._shard_tokens:
                self._close(split)

    def finish(self, report: dict[str, Any]) -> Path:
        """Write dataset.json with `report`, which must be valid JSON, and rename the directory; return its path."""
        with self._described_errors():
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
    def _described_errors(self) -> Iterator[None]:
        """Add to an OSError, such as of a full disk, the name of the data set and its state."""
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            raise OSError(
                f"the data set {self._out} could not be written ({error.strerror or error}); no partial files remain"
            ) from error


def check_destination(out: Path, overwrite: bool) -> None:
    """Check that a data set may be written to `out`.

    `out` must be a new or empty directory, or, with overwrite, a data set without other files.

    Raises:
        FileExistsError: `out` contains something else.
        ValueError: `out` is inside a run's checkpoint.
    """
    check_outside_checkpoints(out)
    if is_dataset(out):
        if not overwrite:
            raise FileExistsError(
                f"{out} already contains a prepared data set; give --overwrite to replace it"
            )
        check_own(out.resolve(), _OWN)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not a prepared data set; give another directory")


class _Shard:
    """A shard being written; its header is written last, when the number of tokens is final."""

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
        with suppress(OSError):  # the disk may be full, and the buffered data are discarded anyway
            self._file.close()


def _npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """Format the _HEADER bytes before a 1-D array in NumPy's format 1.0 (numpy.lib.format)."""
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    magic = np.lib.format.magic(1, 0)
    text = repr(fields).ljust(_HEADER - len(magic) - 3) + "\n"
    return bytes(magic) + len(text).to_bytes(2, "little") + text.encode("ascii")
