"""Checks of a run's directory, and the lock that excludes other runs from it.

The lock is the operating system's (flock) on OUT/.lock. It ends with its process, however that ends, so that no stale
lock is ever left. The file itself means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from fastgpt.atomic_io import enclosing_checkpoint

NAME = ".lock"
_TRIES, _PAUSE = 10, 0.05  # another process may hold the lock for the moment in which it asks who has it
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()


class DirectoryLock:
    """The lock of a run's directory, from its making until `release`.

    A directory that holds nothing when the lock is released is removed if it was made for it.
    """

    def __init__(self, directory: Path, warn: Callable[[str], object] = lambda text: None) -> None:
        """Lock a directory.

        Args:
            directory: made if it does not exist.
            warn: called with a message if the file system has no locks, which is not an error.

        Raises:
            FileExistsError: another run has the directory.
            ValueError: the directory is a checkpoint, or holds something else that a run would damage.
            OSError: it cannot be written.
        """
        check_run_directory(directory)
        self._directory, self._made = directory, not directory.exists()
        self._descriptor: int | None = None
        for again in reversed(range(_TRIES)):
            directory.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(directory / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:  # the run before has just removed the directory
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_ino == (directory / NAME).stat().st_ino:
                    self._descriptor = descriptor
                    break
                os.close(descriptor)  # the run before has just removed the file
            except FileNotFoundError:
                os.close(descriptor)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _UNSUPPORTED:
                    warn(f"{directory} cannot be locked ({error.strerror}); start no other run in it")
                    return
                if not again:
                    raise FileExistsError(in_use(directory)) from None
                time.sleep(_PAUSE)
        if self._descriptor is None:
            raise FileExistsError(in_use(directory))
        _held.add(self._descriptor)
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        with contextlib.suppress(OSError):  # a full disk: only the message of the other run needs it
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, holder)

    def release(self) -> None:
        """Let other runs in."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            (self._directory / NAME).unlink()
        _held.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None
        if self._made:
            with contextlib.suppress(OSError):  # it holds a run
                self._directory.rmdir()


def is_locked(directory: Path) -> bool:
    """Return whether a run has locked the directory."""
    try:
        descriptor = os.open(directory / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _UNSUPPORTED
    finally:
        os.close(descriptor)
    return False


def in_use(directory: Path) -> str:
    """The message that another run has the directory."""
    try:
        holder = json.loads((directory / NAME).read_text("utf-8"))
        who = f" (process {holder['pid']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        who = ""
    return f"another run{who} is writing to {directory}; wait until it ends, or choose another --out"


def check_run_directory(directory: Path) -> None:
    """Raise ValueError for a directory in which a run would damage something, or be damaged."""
    found = enclosing_checkpoint(directory)
    if found is not None:
        if re.fullmatch(r"step-\d+", found.name):
            hint = f"choose {found.parent}, the directory of its run"
        else:
            hint = "choose another directory; a run starts from a checkpoint with --init-from"
        raise ValueError(
            f"--out {directory} is in the checkpoint {found}, which is not to be written to: {hint}"
        )
    if (directory / "dataset.json").is_file():
        raise ValueError(f"--out {directory} holds a prepared data set; choose another directory for the run")
    if (directory / "config.json").is_file() and not (directory / "config.toml").is_file():
        raise ValueError(
            f"--out {directory} holds a Hugging Face model; choose another directory for the run, "
            f"which may start from it with --init-from {directory}"
        )


def _close_inherited() -> None:
    """Close the locks of the parent in a forked child, which would hold them beyond the end of the run."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)
