"""Files as streams: compressed files, standard input, pipes, and the files below a directory.

Compression is detected from the first bytes of a file, not from its name. Decompression is streamed. A file that
expands to more than 64 MiB plus 200 times its size is refused, because no text compresses that well.
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
_HEAD = 6  # bytes that identify the compression
_FREE, _RATIO = 1 << 26, 200  # limit of the expansion: _FREE + _RATIO * (bytes read)
_CHUNK = 1 << 12  # compressed bytes per read; Zstandard can expand them to 100 MB


class NotTextError(ValueError):
    """Error for a file that is not UTF-8 text; the message contains its name."""


def name_of(source: str | Path) -> str:
    """Return the name of a source for messages."""
    return "standard input" if str(source) == STANDARD_INPUT else str(source)


def can_be_read_once(source: str | Path) -> bool:
    """Return True if a source is a stream, such as standard input or a pipe."""
    if str(source) == STANDARD_INPUT:
        return True
    try:
        mode = Path(source).stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


@contextlib.contextmanager
def open_bytes(source: str | Path) -> Iterator[io.BufferedReader]:
    """Open a file, a pipe, or "-" (standard input) for reading, decompressed.

    Raises:
        OSError: the source cannot be read (FileNotFoundError if it does not exist).
        ValueError: the file is damaged.
        ImportError: a package is missing.
    """
    name = name_of(source)
    with _open(source) as raw:
        head = b""
        while len(head) < _HEAD and (
            more := raw.read(_HEAD - len(head))
        ):  # a pipe may return fewer bytes per read
            head += more
        try:
            yield _decompressed(_Rejoined(head, raw), head, name)
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, _ZstandardError) as error:
            raise ValueError(f"{name} is damaged or truncated: {error}") from None


@contextlib.contextmanager
def open_text(source: str | Path) -> Iterator[io.TextIOWrapper]:
    """Open like `open_bytes`, as UTF-8 text without a byte order mark; line ends are unchanged.

    Raises:
        NotTextError: the text is not UTF-8.
    """
    with open_bytes(source) as stream, text_of_stream(stream, name_of(source)) as text:
        yield text


@contextlib.contextmanager
def text_of_stream(stream: io.BufferedReader, name: str) -> Iterator[io.TextIOWrapper]:
    """Decode an open stream in the same way as `open_text`."""
    if stream.peek(2)[:2] in _UTF16:
        raise NotTextError(f"{name} is UTF-16, not UTF-8 text; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        yield io.TextIOWrapper(stream, "utf-8-sig", newline="")
    except UnicodeDecodeError:
        raise NotTextError(f"{name} is not UTF-8 text; convert it with iconv") from None


def reason_of(error: ValueError, file: Path) -> str:
    """Return the message of an error without the file name at its start."""
    return str(error).removeprefix(f"{file}").lstrip(" ,:").removeprefix("is ")


def walk(root: Path) -> tuple[list[Path], list[str]]:
    """List the files below a directory, and a line for each entry that is skipped.

    Links and hidden entries are skipped.

    Raises:
        OSError: the directory itself cannot be read.
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
                left_out.append(f"{path}: not a regular file")
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
        raise FileNotFoundError(f"file or directory {path} does not exist")
    try:
        return path.open("rb")
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from None


def _decompressed(packed: _Rejoined, head: bytes, name: str) -> io.BufferedReader:
    plain: Any = io.BufferedReader(cast(Any, packed))
    if head.startswith(_BZIP2) and not head[3:4].isdigit():
        return plain
    decompressors: dict[bytes, Callable[[Any], Any]] = {
        _GZIP: lambda stream: gzip.GzipFile(fileobj=stream),
        _BZIP2: bz2.BZ2File,
        _XZ: lzma.LZMAFile,
        _ZSTANDARD: lambda stream: _Zstandard(stream, name),
    }
    for start, unpacked in decompressors.items():
        if head.startswith(start):
            return io.BufferedReader(cast(Any, _Bounded(unpacked(plain), packed, name)))
    return plain


class _Bounded(io.RawIOBase):
    """Decompressed stream that raises ValueError if it is implausibly larger than its input."""

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
    """Raise ValueError if `packed` bytes of a file have expanded to implausibly many bytes."""
    if made > _FREE + _RATIO * packed:
        raise ValueError(
            f"{name} expands to more than {_RATIO} times its size, which is implausible for text; "
            "decompress it first to read it anyway"
        )


class _Rejoined(io.RawIOBase):
    """Stream whose first bytes, already consumed for detection, are read again."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest
        self.count = 0  # bytes returned so far

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
    """Error for damaged Zstandard data."""


class _Zstandard(io.RawIOBase):
    """Decompressed stream of Zstandard frames."""

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise ImportError(
                f"{name} is compressed with Zstandard, which needs the package zstandard: pip install zstandard"
            ) from None
        self._stream, self._error = stream, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None  # the frame being read
        self._made, self._packed = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._made:
            self._packed = self._packed or self._stream.read1(_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the compressed data end before their end marker; copy the file again")
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
