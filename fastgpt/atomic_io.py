"""Files that are whole or absent, that stay inside their directory, and that are recognized again.

What is written takes its name by one rename, which is atomic and replaces a link instead of following it. What is read
by a name from a file is looked for inside one directory alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from fastgpt.console import note
from fastgpt.json_io import shown

_TEMPORARY = ".writing-"
_LONGEST_NAME = 255  # of file systems
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


# ---- reading ----


def fingerprint(file: Path) -> dict[str, Any]:
    """{"size": bytes, "sha256": hexadecimal} of a file. Raises OSError if it cannot be read."""
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def inside(directory: Path, name: Any, *, links: bool = False) -> Path:
    """The path of a file that is named in another file, without reading it.

    Raises ValueError for a name that is absolute or has "..", and unless `links` for a link out of the directory.
    """
    relative = Path(name) if isinstance(name, str) and "\0" not in name and "\\" not in name else Path("..")
    longest = max(map(len, relative.parts), default=0)
    if relative.is_absolute() or ".." in relative.parts or not 0 < longest <= _LONGEST_NAME:
        raise ValueError(f"{shown(name)} is not the name of a file in {directory}")
    path = directory / relative
    if not links and not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{path} is a link to a file outside of {directory}")
    return path


def check_files(
    directory: Path, listed: Any, expected: Collection[str], source: str, *, contents: bool = True
) -> None:
    """Compare the files of a directory with a list {name: {"size", "sha256"}}.

    SHA-256 shows damage. It does not show who wrote the files: whoever changes them can change the list.

    Args:
        listed: the list, as it was read.
        expected: the names that will be read; the list must name these and no others.
        source: the name of the file that the list is from, for messages.
        contents: compare SHA-256, and not the sizes alone.

    Raises:
        ValueError: the list is malformed or incomplete, a file is missing, differs or is outside of the directory.
    """
    if not isinstance(listed, Mapping):
        raise ValueError(f"the files in {directory / source} are not a table")
    if odd := sorted(map(str, listed.keys() ^ set(expected))):
        verb = "does not list" if odd[0] in expected else "lists"
        rest = "" if odd[0] in expected else ", which is not a file of it"
        raise ValueError(f"{directory / source} {verb} {shown(odd[0])}{rest}")
    for name, facts in listed.items():
        file = inside(directory, name)
        if not isinstance(facts, Mapping) or type(facts.get("size")) is not int:
            raise ValueError(f"{directory / source} does not say the size and SHA-256 of {name}")
        if not file.is_file():
            raise ValueError(f"{directory} lacks {name}")
        size = file.stat().st_size
        if size != facts.get("size"):
            raise ValueError(f"{file} is damaged: it has {size} bytes, and {source} says {facts['size']}")
        if contents and fingerprint(file) != facts:
            raise ValueError(f"{file} is damaged: its SHA-256 is not what {source} says")


# ---- writing ----


def flush(path: Path) -> None:
    """Have the kernel write a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file that is whole or as before, text in UTF-8. A link is replaced, not followed: not for a path that a
    user named, which may be /dev/stdout.

    Raises OSError if it cannot be written; nothing temporary remains.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    with naming_errors(path):
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fchmod(descriptor, _file_mode())
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def open_to_append(path: Path) -> TextIO:
    """A text file to append to, in UTF-8. Raises OSError for a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return open(path, "a", encoding="utf-8", opener=lambda name, _: os.open(name, flags, 0o666))


class AtomicDirectory:
    """A directory that is whole or absent: its files are written into a temporary sibling, which takes its name.

    The sibling is locked, so that of two processes that write one directory the second fails. What a process that was
    killed left there is removed if it has the names of `own`; nothing else ever is.

    Attributes:
        path: the temporary directory, for the files.
    """

    def __init__(self, target: Path, own: re.Pattern[str]) -> None:
        """Make the temporary directory, and its parents.

        Raises:
            FileExistsError: another process writes it, or something else is in its place.
            OSError: it cannot be made.
        """
        self.target = target
        self.path = target.with_name(f"{_TEMPORARY}{target.name}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir()
        self._descriptor, self._own = _open_directory(self.path), own
        try:
            lock(self._descriptor, target)
            ours = os.fstat(self._descriptor)
            try:
                ours_still = os.path.samestat(ours, os.lstat(self.path))
            except FileNotFoundError:
                ours_still = False
            if not ours_still:
                raise FileExistsError(f"another process has just written {target}")
            _check_own(self._descriptor, self.path, own)
            _empty(self._descriptor, own)
        except BaseException:
            os.close(self._descriptor)
            raise

    def publish(self) -> None:
        """Give the directory its name, after its files are on the disk with the modes that the umask says."""
        mode = _file_mode()
        for file in sorted(self.path.rglob("*")):
            if file.is_file():
                file.chmod(mode)
            flush(file)
        flush(self.path)
        self.path.rename(self.target)
        flush(self.target.parent)

    def discard(self) -> None:
        """Remove the temporary directory and what this process wrote into it."""
        with contextlib.suppress(OSError):
            _empty(self._descriptor, self._own)
            self.path.rmdir()

    def unlock(self) -> None:
        """Let other processes write it."""
        os.close(self._descriptor)


def check_own(directory: Path, own: re.Pattern[str]) -> None:
    """Raise FileExistsError unless a directory is one that this user wrote, with regular files named as `own` says and
    nothing else in it.
    """
    descriptor = _open_directory(directory)
    try:
        _check_own(descriptor, directory, own)
    finally:
        os.close(descriptor)


def remove_own(directory: Path, own: re.Pattern[str]) -> None:
    """Remove a directory that passes `check_own`, and raise as that does; nothing where there is none."""
    try:
        descriptor = _open_directory(directory)
    except FileNotFoundError:
        return
    try:
        _check_own(descriptor, directory, own)
        _empty(descriptor, own)
        directory.rmdir()
    finally:
        os.close(descriptor)


def _open_directory(path: Path) -> int:
    """A descriptor of a directory, not of one that a link leads to."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise FileExistsError(f"{path} is in the way, and not a directory: remove it") from None


def _empty(descriptor: int, own: re.Pattern[str]) -> None:
    for name in filter(own.fullmatch, os.listdir(descriptor)):
        os.unlink(name, dir_fd=descriptor)


def _check_own(descriptor: int, directory: Path, own: re.Pattern[str]) -> None:
    problem = None if os.fstat(descriptor).st_uid == os.geteuid() else "belongs to another user"
    for name in sorted(os.listdir(descriptor)):
        if not own.fullmatch(name) or not stat.S_ISREG(os.lstat(name, dir_fd=descriptor).st_mode):
            problem = problem or f"holds {name}"
    if problem:
        raise FileExistsError(
            f"{directory} is in the way: it {problem}; remove it, or choose another directory"
        )


def lock(descriptor: int, directory: Path) -> None:
    """Hold a directory against other processes, for as long as the descriptor is open.

    A file system without locks gives a note. Raises FileExistsError where another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            note(f"{directory} cannot be locked ({error.strerror}); start no other process that writes it")
            return
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise FileExistsError(
            f"another process is writing {directory}; wait for it, or name another directory"
        ) from None


def _file_mode() -> int:
    """The mode of a new file, as open() gives it; temporary files and safetensors' are for the owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


# ---- the checkpoints of a run, which are removed ----


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
