"""Files as streams: compressed or not, standard input and pipes, and the files below a directory.

Compression is known by a file's first bytes, not by its name. Decompression is streamed, and a file that unpacks to
more than 64 MiB and 200 times its size, as no text does, is refused.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

STANDARD_INPUT = "-"
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
_GZIP, _ZSTANDARD, _BZIP2, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_HEAD = 6  # bytes that tell a compressed file
_FREE, _RATIO = 1 << 26, 200  # bytes that any file may unpack to, and those for each byte of it beyond
_CHUNK = 1 << 12  # compressed bytes at once: Zstandard can make 100 MB of them


class NotTextError(ValueError):
    """A file is not UTF-8 text; the message names it."""


def name_of(source: str | Path) -> str:
    """A file's name in messages."""
    return "standard input" if str(source) == STANDARD_INPUT else str(source)


def can_be_read_once(source: str | Path) -> bool:
    """Whether a source is a stream, as standard input and pipes are."""
    if str(source) == STANDARD_INPUT:
        return True
    try:
        mode = Path(source).stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


@contextlib.contextmanager
def open_bytes(source: str | Path) -> Iterator[io.BufferedReader]:
    """Open a file, a pipe, or "-" for reading, decompressed.

    Raises FileNotFoundError and OSError for what cannot be read, ValueError for a damaged file, ImportError where a
    package is missing.
    """
    name = name_of(source)
    with _open(source) as raw:
        head = b""
        while len(head) < _HEAD and (more := raw.read(_HEAD - len(head))):  # a pipe may give less at once
            head += more
        try:
            yield _decompressed(_Rejoined(head, raw), head, name)
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, _ZstandardError) as error:
            raise ValueError(f"{name} is damaged or cut short: {error}") from None


@contextlib.contextmanager
def open_text(source: str | Path) -> Iterator[io.TextIOWrapper]:
    """`open_bytes` as UTF-8 text with its line ends, without a byte order mark. Raises NotTextError for other text."""
    with open_bytes(source) as stream, text_of_stream(stream, name_of(source)) as text:
        yield text


@contextlib.contextmanager
def text_of_stream(stream: io.BufferedReader, name: str) -> Iterator[io.TextIOWrapper]:
    """An open stream as `open_text` gives it."""
    if stream.peek(2)[:2] in _UTF16:
        raise NotTextError(f"{name} is not UTF-8 text but UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        yield io.TextIOWrapper(stream, "utf-8-sig", newline="")
    except UnicodeDecodeError:
        raise NotTextError(f"{name} is not UTF-8 text") from None


def reason_of(error: ValueError, file: Path) -> str:
    """What an error says about a file, without its name."""
    return str(error).removeprefix(f"{file}").lstrip(" ,:").removeprefix("is ")


def walk(root: Path) -> tuple[list[Path], list[str]]:
    """The files below a directory, and a line for all else: links are not followed, hidden names left out.

    Raises OSError where the directory itself cannot be read.
    """
    files: list[Path] = []
    left_out: list[str] = []

    def unreadable(error: OSError) -> None:
        if error.filename == str(root):
            raise error
        left_out.append(f"{error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=unreadable):
        for name in sorted(folders):
            path = Path(folder, name)
            if path.is_symlink() or name.startswith("."):
                folders.remove(name)
                left_out.append(
                    f"{path}: " + ("linked directory" if path.is_symlink() else "hidden directory")
                )
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith("."):
                left_out.append(f"{path}: hidden file")
            elif path.is_symlink():
                left_out.append(f"{path}: link")
            elif not path.is_file():
                left_out.append(f"{path}: no regular file")
            else:
                files.append(path)
    return files, left_out


def _open(source: str | Path) -> contextlib.AbstractContextManager[BinaryIO]:
    if str(source) == STANDARD_INPUT:
        if sys.stdin is None or sys.stdin.closed:
            raise OSError("standard input is closed; give the name of a file")
        return contextlib.nullcontext(sys.stdin.buffer)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or directory {path}")
    try:
        return path.open("rb")
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from None


def _decompressed(packed: _Rejoined, head: bytes, name: str) -> io.BufferedReader:
    plain: Any = io.BufferedReader(cast(Any, packed))
    if head.startswith(_BZIP2) and not head[3:4].isdigit():
        return plain
    ways: dict[bytes, Callable[[Any], Any]] = {
        _GZIP: lambda stream: gzip.GzipFile(fileobj=stream),
        _BZIP2: bz2.BZ2File,
        _XZ: lzma.LZMAFile,
        _ZSTANDARD: lambda stream: _Zstandard(stream, name),
    }
    for start, unpacked in ways.items():
        if head.startswith(start):
            return io.BufferedReader(cast(Any, _Bounded(unpacked(plain), packed, name)))
    return plain


class _Bounded(io.RawIOBase):
    """What a compressed stream unpacks to. Raises ValueError where that is out of proportion."""

    def __init__(self, unpacked: Any, packed: _Rejoined, name: str) -> None:
        self._unpacked, self._packed, self._name = unpacked, packed, name
        self._made = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._unpacked.readinto(buffer)
        self._made += count
        check_proportion(self._made, self._packed.count, self._name)
        return count


def check_proportion(made: int, packed: int, name: str) -> None:
    """Raise ValueError where some bytes of a file have given more than a text's redundancy explains."""
    if made > _FREE + _RATIO * packed:
        raise ValueError(
            f"{name} unpacks to more than {_RATIO} times its size, as no text does; "
            "if it is to be read, decompress it before"
        )


class _Rejoined(io.RawIOBase):
    """A stream with its first bytes, which have been read, in front of it again."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest
        self.count = 0  # bytes that have been read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._head:
            part, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        else:
            part = (
                self._rest.read1(len(buffer))
                if hasattr(self._rest, "read1")
                else self._rest.read(len(buffer))
            )
        buffer[: len(part)] = part
        self.count += len(part)
        return len(part)


class _ZstandardError(Exception):
    """Zstandard's data are damaged."""


class _Zstandard(io.RawIOBase):
    """A decompressed stream of Zstandard frames."""

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise ImportError(
                f"{name} is compressed by Zstandard, which the package zstandard reads: pip install zstandard"
            ) from None
        self._stream, self._error = stream, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None  # the open one
        self._made, self._packed = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._made:
            self._packed = self._packed or self._stream.read1(_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the compressed data end before their end marker")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._made = self._frame.decompress(self._packed)
            except self._error as error:
                raise _ZstandardError(str(error)) from None
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        part, self._made = self._made[: len(buffer)], self._made[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
