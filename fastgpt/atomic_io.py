"""Atomic files and directories, names restricted to one directory, and checksums.

Files and directories are complete or absent: they are written under a temporary name and renamed atomically. A rename
replaces a symbolic link instead of following it. File names that are read from a file are resolved inside one directory
only.
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
_LONGEST_NAME = 255  # limit of most file systems
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


# ---- reading ----


def fingerprint(file: Path) -> dict[str, Any]:
    """Return {"size": bytes, "sha256": hexadecimal} of a file. Raises OSError if it cannot be read."""
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def inside(directory: Path, name: Any, *, links: bool = False) -> Path:
    """Return the path of a file whose name was read from another file; the file is not opened.

    Args:
        directory: the directory that must contain the file.
        name: the name.
        links: accept symbolic links out of the directory.

    Raises:
        ValueError: the name is absolute, contains "..", or is a link out of the directory.
    """
    relative = Path(name) if isinstance(name, str) and "\0" not in name and "\\" not in name else Path("..")
    longest = max(map(len, relative.parts), default=0)
    if relative.is_absolute() or ".." in relative.parts or not 0 < longest <= _LONGEST_NAME:
        raise ValueError(f"{shown(name)} is not a valid name of a file in {directory}")
    path = directory / relative
    if not links and not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{path} is a link to a file outside of {directory}; replace it by the file")
    return path


def check_files(
    directory: Path, listed: Any, expected: Collection[str], source: str, *, contents: bool = True
) -> None:
    """Compare the files of a directory with a list {name: {"size", "sha256"}}.

    SHA-256 detects damage. It does not authenticate the author: whoever changes the files can change the list.

    Args:
        directory: the directory.
        listed: the list, as it was read.
        expected: names of the files that are read; the list must have exactly these.
        source: name of the file that contains the list, for messages.
        contents: compare SHA-256 in addition to the sizes.

    Raises:
        ValueError: the list is malformed or incomplete, or a file is missing, differs or is outside of the directory.
    """
    if not isinstance(listed, Mapping):
        raise ValueError(f"the files in {directory / source} are not a table; restore the file")
    if odd := sorted(map(str, listed.keys() ^ set(expected))):
        verb = "does not list" if odd[0] in expected else "lists"
        rest = "" if odd[0] in expected else ", an unexpected file"
        raise ValueError(f"{directory / source} {verb} {shown(odd[0])}{rest}")
    for name, facts in listed.items():
        file = inside(directory, name)
        if not isinstance(facts, Mapping) or type(facts.get("size")) is not int:
            raise ValueError(f"{directory / source} lacks the size and SHA-256 of {name}")
        if not file.is_file():
            raise ValueError(f"{directory} lacks {name}")
        size = file.stat().st_size
        if size != facts.get("size"):
            raise ValueError(f"{file} is damaged: it has {size} bytes, not {facts['size']} as in {source}")
        if contents and fingerprint(file) != facts:
            raise ValueError(f"{file} is damaged: its SHA-256 differs from that in {source}")


# ---- writing ----


def flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Add the file name to OSErrors that lack one, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text in UTF-8.

    A symbolic link is replaced, not followed. Do not use it for paths given by a user, which may be /dev/stdout.

    Raises:
        OSError: the file cannot be written; no temporary file remains.
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
    """Open a UTF-8 text file for appending. Raises OSError for a symbolic link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return open(path, "a", encoding="utf-8", opener=lambda name, _: os.open(name, flags, 0o666))


class AtomicDirectory:
    """A directory that is complete or absent: files are written to a temporary sibling, which is then renamed.

    The sibling is locked, so that the second of two processes that write the same directory fails. Files of a killed
    process are removed from it if their names match `own`; no other files are ever removed.

    Attributes:
        path: the temporary directory for the files.
    """

    def __init__(self, target: Path, own: re.Pattern[str]) -> None:
        """Create the temporary directory, and its parents.

        Args:
            target: the final path.
            own: pattern of the names of the files that this directory may contain.

        Raises:
            FileExistsError: another process writes it, or the temporary path contains something else.
            OSError: it cannot be created.
        """
        self.target = target
        self.path = target.with_name(f"{_TEMPORARY}{target.name}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir()
        self._descriptor, self._own = _open_directory(self.path), own
        try:
            lock(self._descriptor, target)
            # Another process may have renamed the directory between the opening and the lock.
            opened = os.fstat(self._descriptor)
            try:
                is_same = os.path.samestat(opened, os.lstat(self.path))
            except FileNotFoundError:
                is_same = False
            if not is_same:
                raise FileExistsError(f"another process has just written {target}; choose another directory")
            _check_own(self._descriptor, self.path, own)
            _empty(self._descriptor, own)
        except BaseException:
            os.close(self._descriptor)
            raise

    def publish(self) -> None:
        """Set the files' modes by the umask, flush them to disk, and rename the directory to its final path."""
        mode = _file_mode()
        for file in sorted(self.path.rglob("*")):
            if file.is_file():
                file.chmod(mode)
            flush(file)
        flush(self.path)
        self.path.rename(self.target)
        flush(self.target.parent)

    def discard(self) -> None:
        """Remove the temporary directory and the files in it."""
        with contextlib.suppress(OSError):
            _empty(self._descriptor, self._own)
            self.path.rmdir()

    def unlock(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


def check_own(directory: Path, own: re.Pattern[str]) -> None:
    """Check that a directory belongs to this user and contains only regular files with names that match `own`.

    Raises FileExistsError otherwise.
    """
    descriptor = _open_directory(directory)
    try:
        _check_own(descriptor, directory, own)
    finally:
        os.close(descriptor)


def remove_own(directory: Path, own: re.Pattern[str]) -> None:
    """Remove a directory after `check_own`, whose errors it raises; do nothing if it does not exist."""
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
    """Open a descriptor of a directory, but not through a symbolic link."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise FileExistsError(f"{path} cannot be used: it is not a directory; remove it") from None


def _empty(descriptor: int, own: re.Pattern[str]) -> None:
    for name in filter(own.fullmatch, os.listdir(descriptor)):
        os.unlink(name, dir_fd=descriptor)


def _check_own(descriptor: int, directory: Path, own: re.Pattern[str]) -> None:
    problem = None if os.fstat(descriptor).st_uid == os.geteuid() else "belongs to another user"
    for name in sorted(os.listdir(descriptor)):
        if not own.fullmatch(name) or not stat.S_ISREG(os.lstat(name, dir_fd=descriptor).st_mode):
            problem = problem or f"contains {name}"
    if problem:
        raise FileExistsError(
            f"{directory} cannot be used: it {problem}; remove it, or choose another directory"
        )


def lock(descriptor: int, directory: Path) -> None:
    """Lock a directory against other processes while the descriptor is open.

    On a file system without locks only a note is printed.

    Raises:
        FileExistsError: another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            note(
                f"{directory} cannot be locked ({error.strerror}); do not start another process that writes it"
            )
            return
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise FileExistsError(
            f"another process is writing {directory}; wait for it, or choose another directory"
        ) from None


def _file_mode() -> int:
    """Return the mode of a new file under the umask; temporary and safetensors files are private by default."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


# ---- outputs inside the checkpoints of a run, which would be removed with them ----


def enclosing_checkpoint(path: Path) -> Path | None:
    """Return the training checkpoint that contains a path or is that path, or None.

    A run removes its older checkpoints, with all files in them.
    """
    absolute, real = path.absolute(), path.resolve()
    for parent in dict.fromkeys((real, *real.parents, absolute, *absolute.parents)):
        if re.fullmatch(r"(\.writing-)?step-\d{8,}", parent.name) or (
            (parent / "state.json").is_file() and (parent / "tokenizer.json").is_file()
        ):
            return parent
    return None


def check_outside_checkpoints(path: Path) -> None:
    """Raise ValueError for an output path inside a checkpoint."""
    found = enclosing_checkpoint(path)
    if found is not None:
        raise ValueError(
            f"{path} is inside the checkpoint {found} and would be removed with it; choose another directory"
        )
