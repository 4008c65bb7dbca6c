"""Tile sizes that `python -m bench tune` found on this machine, which replace those of the kernels' tables.

A launcher has a row of numbers for a kernel (tile sizes, warps, stages) and calls `chosen`, which returns a better row
if one is known for its sizes on its GPU. The rows are read from the disk once per process, at the first launch on a
GPU; nothing is timed here. A row is valid for one device, version of Triton, kernel, dtype and size.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

_MAX_ROWS, _MAX_NUMBER = 10_000, 1 << 16  # rows of the file, and numbers of a row; tile sizes are far below
_MAX_CHARACTERS = 1 << 24  # of the file
Row = tuple[int, ...]
Question = tuple[str, str, Row]  # kernel, dtype, sizes


@dataclass
class Trial:
    """Rows to launch instead of all others, by kernel, and the questions of launchers with their own rows."""

    rows: dict[str, Row]
    asked: dict[Question, Row] = field(default_factory=dict)


_trial: Trial | None = None


def chosen(kernel: str, x: Tensor, size: Row, row: Row) -> Row:
    """Return the row that was found best for the kernel at this size on x's GPU, or else the launcher's own.

    Args:
        kernel: its name in `bench.tune.CANDIDATES`.
        size: the sizes on which the best row depends.
        row: the launcher's own.
    """
    if _trial is not None:
        _trial.asked[kernel, _name(x.dtype), size] = row
        return _trial.rows.get(kernel, row)
    if not x.is_cuda:
        return row
    known = _known(x.device.index)
    found = known.get((kernel, _name(x.dtype), size)) if known else None
    return found if found and len(found) == len(row) else row


@contextlib.contextmanager
def trying(rows: dict[str, Row]) -> Iterator[Trial]:
    """Use these rows for all launches within the context; not for several threads at a time."""
    global _trial  # noqa: PLW0603
    before, _trial = _trial, Trial(rows)
    try:
        yield _trial
    finally:
        _trial = before


def path() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "fastgpt" / "tuned.json"


def load() -> list[dict[str, Any]]:
    """Read all rows on the disk; none, with a warning, if `save` did not write the file."""
    try:
        with path().open(encoding="utf-8") as file:
            text = file.read(_MAX_CHARACTERS)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(str(error))
    try:
        records = json.loads(text)["rows"]
        for record in records:
            strings = [record[key] for key in ("device", "triton", "kernel", "dtype")]
            numbers = [*record["size"], *record["row"]]
            if not all(isinstance(s, str) for s in strings) or not all(type(n) is int for n in numbers):
                return _ignored("a row has other fields than it should have")
            if not record["row"] or not 0 < min(record["row"]) <= max(record["row"]) <= _MAX_NUMBER:
                return _ignored(f"a row has a number outside of 1 to {_MAX_NUMBER}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return _ignored(f"it is not what `python -m bench tune` writes ({error!r})")
    return list(records)


def save(device: str, rows: dict[Question, Row]) -> Path:
    """Add rows to those on the disk, replacing the file atomically; concurrent processes wait for each other."""
    path().parent.mkdir(parents=True, exist_ok=True)
    with _locked(path().parent):
        _replace(device, rows)
    _known.cache_clear()
    return path()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory against other processes and threads; without effect on a file system without locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(device: str, rows: dict[Question, Row]) -> None:
    new = {(device, triton.__version__, *question): row for question, row in rows.items()}
    kept = {_key(record): tuple(record["row"]) for record in load()} | new
    names = ("device", "triton", "kernel", "dtype", "size")
    records = [dict(zip(names, key, strict=True)) | {"row": row} for key, row in sorted(kept.items())]
    text = json.dumps({"rows": records[-_MAX_ROWS:]}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path().parent, suffix=".json", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path())
        except BaseException:
            os.unlink(file.name)
            raise


@functools.cache
def _known(index: int) -> dict[Question, Row]:
    device, records = torch.cuda.get_device_name(index), load()
    ours = [record for record in records if record["triton"] == triton.__version__]
    if records and not ours:
        _ignored(f"it is of Triton {records[0]['triton']} and this is {triton.__version__}")
    return {_key(record)[2:]: tuple(record["row"]) for record in ours if record["device"] == device}


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return (*(record[key] for key in ("device", "triton", "kernel", "dtype")), tuple(record["size"]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ignored(reason: str) -> list[dict[str, Any]]:
    """Warn that the file is ignored, and why; return no rows."""
    warnings.warn(
        f"fastgpt: {path()} is ignored, kernels run with their own tables: {reason}; "
        "run `python -m bench tune` again, or delete it",
        stacklevel=2,
    )
    return []
