"""Records of JSON Lines, JSON, CSV, TSV and Parquet files, read one at a time, and their texts."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.data.files import (
    COMPRESSED,
    can_be_read_once,
    check_proportion,
    name_of,
    open_bytes,
    open_text,
    text_of_stream,
)
from fastgpt.json_io import shown

TEXT, JSON_LINES, JSON, CSV, TSV, PARQUET = "text", "JSON Lines", "JSON", "CSV", "TSV", "Parquet"
_SUFFIXES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), JSON_LINES),
    **{".json": JSON, ".csv": CSV, ".tsv": TSV, ".tab": TSV},
    **dict.fromkeys((".parquet", ".pq"), PARQUET),
}
_LONGEST = 1 << 26  # bytes of a line, characters of a record
_CHUNK = 1 << 16
_SHOWN_KEYS, _SHOWN_DEPTH = 12, 8
_QUOTED = re.compile(r'"[^"]*"')
_SPACE = re.compile(r"[ \t\r\n]*")


class FormatError(ValueError):
    """Error for a file that is not of its format, or has no text under the key; the message contains its name."""


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        location: file and line or record number, for messages.
        value: the parsed value.
        problem: the reason why there is no value, or None.
        plain: True if the value is the text itself, not an object with keys.
    """

    location: str
    value: Any = None
    problem: str | None = None
    plain: bool = False


def format_of(source: str | Path) -> str:
    """Return the format that a file's name implies, else "text"; a suffix for compression is ignored."""
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1], TEXT) if suffixes else TEXT


def sniff_format(stream: io.BufferedReader) -> str:
    """Detect the format of a stream without a name.

    It is JSON Lines if the first line is a JSON object, JSON if it begins like an array of objects, else text.
    """
    start = stream.peek(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        return JSON if start[1:].lstrip().startswith(b"{") else TEXT
    if start.startswith(b"{"):
        line, ended, _ = start.partition(b"\n")
        with contextlib.suppress(ValueError, RecursionError):
            return JSON_LINES if isinstance(json.loads(line), dict) else TEXT
        return TEXT if ended else JSON_LINES  # the first line is longer than the buffer
    return TEXT


def records_of_stream(stream: io.BufferedReader, name: str) -> Iterator[Record] | None:
    """Read the records of a stream without a name; return None for text."""
    kind = sniff_format(stream)
    if kind == TEXT:
        return None
    return json_lines(stream, name) if kind == JSON_LINES else _json_of_stream(stream, name)


def _json_of_stream(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    with text_of_stream(stream, name) as text:
        yield from json_values(text, name)


def read_records(source: str | Path, kind: str, keys: Sequence[str] = ()) -> Iterator[Record]:
    """Read the records of a file, decompressed.

    Args:
        source: the file.
        kind: its format.
        keys: keys to read; a Parquet file that has them is read without its other columns.

    Raises:
        FormatError: the file is not of its format.
        NotTextError: the file is not UTF-8 text.
        OSError: the file cannot be read.
        ImportError: a package is missing.
    """
    if kind == PARQUET:
        yield from _parquet(source, keys)
    elif kind == JSON_LINES:
        with open_bytes(source) as stream:
            yield from json_lines(stream, name_of(source))
    else:
        with open_text(source) as text:
            yield from (
                json_values(text, name_of(source)) if kind == JSON else _table(text, name_of(source), kind)
            )


def text_of(record: Record, key: str) -> str | Record:
    """Return the text under a key ("a.b" for {"a": {"b": text}}), or a record with the problem."""
    if record.problem is not None:
        return record
    if record.plain:
        return str(record.value)
    if isinstance(record.value, dict):
        found = record.value.get(key)
        if found is None:
            found = _nested(record.value, key)
        if isinstance(found, str):
            return found
        return Record(record.location, problem=f"there is no text under {key!r}; {_hint(record.value)}")
    kind = type(record.value).__name__
    return Record(
        record.location,
        problem=f"there is no text under {key!r}: the record is of type {kind}, not an object",
    )


def json_lines(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """Read one JSON value per line; blank lines are skipped."""
    number = 0
    while line := stream.readline(_LONGEST + 1):
        number += 1
        location = f"{name}, line {number}"
        if len(line) > _LONGEST:
            raise FormatError(f"{location} is longer than {_LONGEST >> 20} MiB; split the text")
        if not line.strip():
            continue
        try:
            yield Record(location, json.loads(line.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            yield Record(location, problem=f"not JSON ({error})")


def json_values(stream: io.TextIOBase, name: str) -> Iterator[Record]:
    """Read the values of a JSON array, or a sequence of JSON values.

    A string in an array is a text without a key.
    """
    reader = _JSONReader(stream, name)
    array = reader.skip("[")
    number = 0
    while not (array and reader.skip("]")) and not reader.at_end():
        if array and number and not reader.skip(","):
            raise FormatError(f"{name} is not JSON: record {number} is not followed by a comma")
        number += 1
        value = reader.value()
        yield Record(f"{name}, record {number}", value, plain=array and isinstance(value, str))
    if array and not reader.closed:
        raise FormatError(f"{name} is not JSON: the array has no end; check whether the file is truncated")
    if not reader.at_end():
        raise FormatError(f"{name} is not JSON: there is text after the array")


class _JSONReader:
    """Reader of the JSON values of a stream, with one value in memory at a time."""

    def __init__(self, stream: io.TextIOBase, name: str) -> None:
        self._stream, self._name = stream, name
        self._text, self._at, self._ended = "", 0, False
        self._decode = json.JSONDecoder().raw_decode
        self.closed = False

    def skip(self, character: str) -> bool:
        """Skip a character if it is the next one; return True if it was."""
        if self.at_end() or self._text[self._at] != character:
            return False
        self._at += 1
        self.closed = character == "]"
        return True

    def at_end(self) -> bool:
        """Return True if only white space is left."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return False
            if self._ended:
                return True
            self._read()

    def value(self) -> Any:
        """Parse the next value."""
        self.at_end()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError):
                    raise FormatError(f"{self._name} is not JSON ({error})") from None
            if len(self._text) - self._at > _LONGEST:
                raise FormatError(f"{self._name} contains a value longer than {_LONGEST >> 20} MiB; split it")
            self._read()

    def _read(self) -> None:
        """Double the buffer, so that a long value is parsed only a logarithmic number of times."""
        rest = self._text[self._at :]
        more = self._stream.read(max(_CHUNK, len(rest)))
        self._text, self._at, self._ended = rest + more, 0, not more


def _table(stream: io.TextIOBase, name: str, kind: str) -> Iterator[Record]:
    """Read the rows of a table with a header; columns of a CSV file may be separated by semicolons or tabs, too."""
    csv.field_size_limit(_LONGEST)
    start = stream.readline(_CHUNK)
    delimiter = "\t" if kind == TSV else max(",;\t", key=_QUOTED.sub("", start).count)
    size = 0  # characters of the current record, which may span several lines

    def lines() -> Iterator[str]:
        nonlocal size
        line = start if start.endswith("\n") else start + stream.readline(_LONGEST)
        while line:
            size += len(line)
            if size > _LONGEST:
                raise FormatError(f"{name} contains a record longer than {_LONGEST >> 20} MiB; split it")
            yield line
            line = stream.readline(_LONGEST + 1)

    rows = csv.reader(lines(), delimiter=delimiter)
    header: list[str] = []
    line = 1
    try:
        for row in rows:
            size = 0
            location, line = f"{name}, line {line}", rows.line_num + 1
            if not row:
                continue
            if not header:
                header = [column.strip() for column in row]
            elif len(row) > len(header):
                yield Record(
                    location, problem=f"it has {len(row)} fields and the header {len(header)} columns"
                )
            else:
                yield Record(location, dict(zip(header, row, strict=False)))
    except csv.Error as error:
        raise FormatError(f"{name}, line {rows.line_num}: {error}") from None


def _parquet(source: str | Path, keys: Sequence[str]) -> Iterator[Record]:
    name = name_of(source)
    if can_be_read_once(source):
        raise ValueError(f"{name} is a stream, and Parquet needs random access; give the name of a file")
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError(
            f"{name} is a Parquet file, which needs the package pyarrow: pip install pyarrow"
        ) from None
    number = made = 0
    size = Path(source).stat().st_size
    try:
        with ParquetFile(source) as file:
            names = file.schema_arrow.names
            columns = [key if key in names else key.partition(".")[0] for key in keys]
            wanted = columns if columns and set(columns) <= set(names) else None
            # One row at a time: the file may store one long text for many rows, and each row expands it.
            for batch in file.iter_batches(batch_size=1, columns=wanted):
                number, made = number + 1, made + batch.nbytes
                if batch.nbytes > _LONGEST:
                    raise FormatError(
                        f"{name}, record {number} is longer than {_LONGEST >> 20} MiB; split it"
                    )
                check_proportion(made, size, name)
                try:
                    (row,) = batch.to_pylist()
                except (ValueError, OverflowError) as error:  # invalid UTF-8, or a date out of Python's range
                    raise FormatError(
                        f"{name}, record {number} cannot be read: {_first_line(error)}"
                    ) from None
                yield Record(f"{name}, record {number}", row)
    except (ArrowException, OSError) as error:
        raise FormatError(f"{name} is not a complete Parquet file: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _nested(value: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _hint(record: dict[Any, Any]) -> str:
    """Describe the keys that have a text, for a message."""
    keys = list(_text_keys(record))
    if not keys:
        return "no key has a text; the keys are " + list_keys([str(key) for key in record])
    return f"the keys with a text are {list_keys(keys)}; name one with --text-key"


def list_keys(keys: list[str]) -> str:
    """Format at most _SHOWN_KEYS keys for a message."""
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return (", ".join(map(shown, keys[:_SHOWN_KEYS])) or "none") + more


def _text_keys(record: dict[Any, Any], prefix: str = "", depth: int = _SHOWN_DEPTH) -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, str):
            yield f"{prefix}{key}"
        elif isinstance(value, dict) and depth:
            yield from _text_keys(value, f"{prefix}{key}.", depth - 1)
