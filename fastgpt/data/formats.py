"""Records of JSON Lines, JSON, CSV, TSV and Parquet files, one at a time, and the text in them."""

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
    """A file does not hold records of its format, or not under the wanted key; the message names it."""


@dataclass(frozen=True)
class Record:
    """A record, and where it is from; `problem` says why there is none. A plain one is a text without a key."""

    place: str
    value: Any = None
    problem: str | None = None
    plain: bool = False


def format_of(source: str | Path) -> str:
    """The format that a file's name says, "text" for all others; compression does not matter."""
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1], TEXT) if suffixes else TEXT


def sniffed(stream: io.BufferedReader) -> str:
    """The format of a stream without a name: JSON Lines if its first line is a JSON object, JSON if it begins as an
    array of them, else text.
    """
    start = stream.peek(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        return JSON if start[1:].lstrip().startswith(b"{") else TEXT
    if start.startswith(b"{"):
        line, ended, _ = start.partition(b"\n")
        with contextlib.suppress(ValueError, RecursionError):
            return JSON_LINES if isinstance(json.loads(line), dict) else TEXT
        return TEXT if ended else JSON_LINES  # a first line that is longer than what has been read
    return TEXT


def records_of_stream(stream: io.BufferedReader, name: str) -> Iterator[Record] | None:
    """The records of a stream without a name; None if it is a text."""
    kind = sniffed(stream)
    if kind == TEXT:
        return None
    return json_lines(stream, name) if kind == JSON_LINES else _json_of_stream(stream, name)


def _json_of_stream(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    with text_of_stream(stream, name) as text:
        yield from json_values(text, name)


def read_records(source: str | Path, kind: str, keys: Sequence[str] = ()) -> Iterator[Record]:
    """The records of a file, decompressed; where it has the keys, and that saves reading, without others.

    Raises FormatError, NotTextError, OSError, and ImportError where a package is missing.
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
    """The text under a key, "a.b" for {"a": {"b": text}}; or a record with the problem."""
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
        return Record(record.place, problem=f"there is no text under {key!r}; {_hint(record.value)}")
    kind = type(record.value).__name__
    return Record(
        record.place, problem=f"there is no text under {key!r}: the record is no object but a {kind}"
    )


def json_lines(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """A JSON value a line; blank lines are none."""
    number = 0
    while line := stream.readline(_LONGEST + 1):
        number += 1
        place = f"{name}, line {number}"
        if len(line) > _LONGEST:
            raise FormatError(f"{place} is longer than {_LONGEST >> 20} MiB")
        if not line.strip():
            continue
        try:
            yield Record(place, json.loads(line.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            yield Record(place, problem=f"not JSON ({error})")


def json_values(stream: io.TextIOBase, name: str) -> Iterator[Record]:
    """The values of a JSON array, a string among them as the text itself; or JSON values that follow one another."""
    reader = _JSONReader(stream, name)
    array = reader.skip("[")
    number = 0
    while not (array and reader.skip("]")) and not reader.at_end():
        if array and number and not reader.skip(","):
            raise FormatError(f"{name} is not JSON: after record {number} there is no comma")
        number += 1
        value = reader.value()
        yield Record(f"{name}, record {number}", value, plain=array and isinstance(value, str))
    if array and not reader.closed:
        raise FormatError(f"{name} is not JSON: the array has no end; was it cut short?")
    if not reader.at_end():
        raise FormatError(f"{name} is not JSON: there is more after the array")


class _JSONReader:
    """The JSON values of a stream, one in memory at a time."""

    def __init__(self, stream: io.TextIOBase, name: str) -> None:
        self._stream, self._name = stream, name
        self._text, self._at, self._ended = "", 0, False
        self._decode = json.JSONDecoder().raw_decode
        self.closed = False

    def skip(self, sign: str) -> bool:
        """Go past a sign if it comes next."""
        if self.at_end() or self._text[self._at] != sign:
            return False
        self._at += 1
        self.closed = sign == "]"
        return True

    def at_end(self) -> bool:
        """Whether only white space is left."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return False
            if self._ended:
                return True
            self._read()

    def value(self) -> Any:
        """The next value."""
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
                raise FormatError(f"{self._name} holds a value longer than {_LONGEST >> 20} MiB")
            self._read()

    def _read(self) -> None:
        """Read as much again as there is, so that a long value is parsed a logarithmic number of times."""
        rest = self._text[self._at :]
        more = self._stream.read(max(_CHUNK, len(rest)))
        self._text, self._at, self._ended = rest + more, 0, not more


def _table(stream: io.TextIOBase, name: str, kind: str) -> Iterator[Record]:
    """The rows of a table with a header; a CSV file's columns may be parted by semicolons or tabs, too."""
    csv.field_size_limit(_LONGEST)
    start = stream.readline(_CHUNK)
    delimiter = "\t" if kind == TSV else max(",;\t", key=_QUOTED.sub("", start).count)
    size = 0  # of the record so far, which may have several lines

    def lines() -> Iterator[str]:
        nonlocal size
        line = start if start.endswith("\n") else start + stream.readline(_LONGEST)
        while line:
            size += len(line)
            if size > _LONGEST:
                raise FormatError(f"{name} holds a record longer than {_LONGEST >> 20} MiB")
            yield line
            line = stream.readline(_LONGEST + 1)

    rows = csv.reader(lines(), delimiter=delimiter)
    header: list[str] = []
    line = 1
    try:
        for row in rows:
            size = 0
            place, line = f"{name}, line {line}", rows.line_num + 1
            if not row:
                continue
            if not header:
                header = [column.strip() for column in row]
            elif len(row) > len(header):
                yield Record(place, problem=f"there are {len(row)} fields, and {len(header)} columns")
            else:
                yield Record(place, dict(zip(header, row, strict=False)))
    except csv.Error as error:
        raise FormatError(f"{name}, line {rows.line_num}: {error}") from None


def _parquet(source: str | Path, keys: Sequence[str]) -> Iterator[Record]:
    name = name_of(source)
    if can_be_read_once(source):
        raise ValueError(f"{name}: a Parquet file cannot be read from a stream; give the name of a file")
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError(
            f"{name}: Parquet files are read by the package pyarrow: pip install pyarrow"
        ) from None
    number = made = 0
    size = Path(source).stat().st_size
    try:
        with ParquetFile(source) as file:
            names = file.schema_arrow.names
            columns = [key if key in names else key.partition(".")[0] for key in keys]
            wanted = columns if columns and set(columns) <= set(names) else None
            # One at a time: a row of a few bytes may be a long text, which all rows share in the file.
            for batch in file.iter_batches(batch_size=1, columns=wanted):
                number, made = number + 1, made + batch.nbytes
                if batch.nbytes > _LONGEST:
                    raise FormatError(f"{name}, record {number} is longer than {_LONGEST >> 20} MiB")
                check_proportion(made, size, name)
                try:
                    (row,) = batch.to_pylist()
                except (
                    ValueError,
                    OverflowError,
                ) as error:  # bytes that are not UTF-8, a date beyond Python's
                    raise FormatError(
                        f"{name}, record {number} cannot be read: {_first_line(error)}"
                    ) from None
                yield Record(f"{name}, record {number}", row)
    except (ArrowException, OSError) as error:
        raise FormatError(f"{name} is not a whole Parquet file: {_first_line(error)}") from None


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
    """The keys that a text is under, for a message."""
    keys = list(_text_keys(record))
    if not keys:
        return "no key has a text; the keys are " + listed([str(key) for key in record])
    return f"the keys with a text are {listed(keys)}; name one with --text-key"


def listed(keys: list[str]) -> str:
    """Keys for a message, not too many."""
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return (", ".join(map(shown, keys[:_SHOWN_KEYS])) or "none") + more


def _text_keys(record: dict[Any, Any], prefix: str = "", depth: int = _SHOWN_DEPTH) -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, str):
            yield f"{prefix}{key}"
        elif isinstance(value, dict) and depth:
            yield from _text_keys(value, f"{prefix}{key}.", depth - 1)
