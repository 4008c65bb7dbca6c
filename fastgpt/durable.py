"""Files that survive: on the disk before they are relied on, and recognised again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fingerprint(file: Path) -> dict[str, Any]:
    """{"size": bytes, "sha256": hexadecimal} of a file. Raises OSError if it cannot be read."""
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def flush(path: Path) -> None:
    """Have the kernel write a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def enclosing_checkpoint(path: Path) -> Path | None:
    """The checkpoint of a training run that a path is or lies in, if any: what is written there goes with it, when the
    run removes its older checkpoints.
    """
    named, real = path.absolute(), path.resolve()
    for place in dict.fromkeys((real, *real.parents, named, *named.parents)):
        if re.fullmatch(r"(\.writing-)?step-\d{8,}", place.name) or (
            (place / "state.json").is_file() and (place / "tokenizer.json").is_file()
        ):
            return place
    return None


def check_outside_checkpoints(path: Path) -> None:
    """Raise ValueError for an output inside a checkpoint."""
    found = enclosing_checkpoint(path)
    if found is not None:
        raise ValueError(
            f"{path} is in the checkpoint {found}, and would be removed with it; choose another directory"
        )


def lock_directory(directory: Path) -> int:
    """Hold a directory against other processes, for as long as the returned descriptor is open.

    Raises FileExistsError where another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise FileExistsError(
            f"another process is writing {directory}; wait for it, or name another directory"
        ) from None
    return descriptor
