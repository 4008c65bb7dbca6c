"""Corpora for training: reading of files and directories, and the split into training and held-out text."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastgpt.data.files import (
    STANDARD_INPUT,
    NotTextError,
    can_be_read_once,
    name_of,
    open_bytes,
    reason_of,
    text_of_stream,
    walk,
)
from fastgpt.data.formats import (
    JSON_LINES,
    TEXT,
    FormatError,
    Record,
    format_of,
    read_records,
    records_of_stream,
    text_of,
)

HELD_OUT = 0.07  # fraction of a corpus of many documents that is held out
_HELD_OUT_OF_A_FILE = 0.1  # fraction of each document, at its end, in a corpus of few
_SHOWN = 5  # skipped entries that an error message lists
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")  # the byte tokenizer marks the end of a text with NUL
_ENOUGH_FILES = 10  # fewer documents are too coarse a unit to hold out

# Excluded from the standard library: tests, demos, installers, code about Python 2, and generated tables.
_NOT_STDLIB = {
    *("site-packages", "dist-packages", "ensurepip", "test", "tests", "idle_test", "idlelib", "turtledemo"),
    *("lib2to3", "encodings", "pydoc_data"),
}


@dataclass(frozen=True)
class Loaded:
    """Complete documents of a source.

    Attributes:
        texts: the documents.
        records: True if the documents are the records of a file.
        left_out: a line for each file, link and directory that was skipped, and for records with an empty text.
    """

    texts: list[str]
    records: bool = False
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, in their order.

    Attributes:
        name: the source.
        train: the training documents.
        val: the held-out documents.
        records: as in `Loaded`.
        left_out: as in `Loaded`.
    """

    name: str
    train: list[str]
    val: list[str]
    records: bool = False
    left_out: list[str] = field(default_factory=list)


def load_corpus(source: str, text_key: str = "text", skip_broken: bool = False) -> Corpus:
    """Load a corpus and hold out part of it.

    Whole documents are held out. With fewer than ten documents, the last tenth of each is held out instead. Files may
    be compressed. Files are ordered by a hash of their names: the order is the same on every machine, and the training
    and held-out parts are alike.

    Args:
        source: "stdlib" (source code of the Python standard library, about 9 MB), "-" (standard input), a file, or a
            directory. Files are JSON Lines, JSON, CSV, TSV or Parquet by their names, else text. Each record of a file
            of records is a document. In a directory, files that are not text, hidden files and links are skipped.
        text_key: key or column of the text in records.
        skip_broken: skip records without text instead of raising ValueError.

    Raises:
        OSError: the source cannot be read (FileNotFoundError if it does not exist).
        ValueError: the source is not text, or a record has no text.
        ImportError: a package is missing.
    """
    loaded = read_source(source, text_key, skip_broken)
    return _hold_out(source, loaded)


def load_documents(source: str, text_key: str = "text") -> list[str]:
    """Load all documents of a source, without a held-out part; otherwise like `load_corpus`."""
    return read_source(source, text_key).texts


def read_source(source: str, text_key: str = "text", skip_broken: bool = False) -> Loaded:
    """Read the documents of a source; arguments and exceptions are those of `load_corpus`."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = in_order_of_hash(root, stdlib_files(root))
        return Loaded([read_text(file) for file in files if file.stat().st_size])
    if source != STANDARD_INPUT and Path(source).is_dir():
        return _read_directory(Path(source), text_key, skip_broken)
    kind = format_of(source)
    if can_be_read_once(source):
        return _read_stream(source, text_key, skip_broken)
    if kind == TEXT:
        return Loaded([read_text(source)])
    if Path(source).is_file() and not Path(source).stat().st_size:
        raise ValueError(f"{source} is empty")
    return _texts(read_records(source, kind, [text_key]), name_of(source), text_key, skip_broken)


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, decompressed and without a byte order mark; "-" is standard input.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is empty or not text.
        ImportError: a package is missing.
    """
    with open_bytes(path) as stream:
        return _read_open_text(stream, name_of(path))


def _read_open_text(stream: io.BufferedReader, name: str) -> str:
    if not stream.peek(1):
        raise ValueError(f"{name} is empty")
    with text_of_stream(stream, name) as text:
        whole = text.read()
    if "\0" in whole:
        raise NotTextError(f"{name} is not UTF-8 text: it contains a NUL character")
    return whole


def _read_stream(source: str, text_key: str, skip_broken: bool) -> Loaded:
    """Read standard input or a pipe, and detect the format from the first bytes."""
    name = name_of(source)
    with open_bytes(source) as stream:
        records = records_of_stream(stream, name)
        if records is None:
            return Loaded([_read_open_text(stream, name)])
        return _texts(records, name, text_key, skip_broken)


def _read_directory(root: Path, text_key: str, skip_broken: bool) -> Loaded:
    files, left_out = walk(root)
    texts = []
    for file in in_order_of_hash(root, files):
        kind = format_of(file)
        try:
            if not file.stat().st_size:
                left_out.append(f"{file}: empty")
            elif kind == TEXT:
                texts.append(read_text(file))
            else:
                must_fit = kind != JSON_LINES  # JSON files and tables often contain no texts
                found = _texts(
                    read_records(file, kind, [text_key]), str(file), text_key, skip_broken, must_fit=must_fit
                )
                texts += found.texts
                left_out += found.left_out
        except (NotTextError, FormatError) as error:
            left_out.append(f"{file}: {reason_of(error, file)}")
    if not texts:
        reasons = f"; skipped: {', '.join(left_out[:_SHOWN])}" if left_out else ""
        raise ValueError(f"{root} contains no text files{reasons}")
    return Loaded(texts, left_out=left_out)


def _texts(
    records: Iterator[Record], name: str, text_key: str, skip_broken: bool, *, must_fit: bool = False
) -> Loaded:
    """Collect the texts of records. With must_fit, raise FormatError if the first record has no text."""
    texts: list[str] = []
    left_out: list[str] = []
    empty = 0
    for record in records:
        text = text_of(record, text_key)
        if isinstance(text, str) and _NO_CHARACTER.search(text):
            text = Record(
                record.location,
                problem="the text contains a NUL or a surrogate; clean it with fastgpt data",
            )
        if isinstance(text, str):
            texts += [text] if text else []
            empty += not text
        elif must_fit:
            raise FormatError(f"{text.location}: {text.problem}")
        elif skip_broken:
            left_out.append(f"{text.location}: {text.problem}")
        else:
            raise ValueError(f"{text.location}: {text.problem}; give --skip-broken to skip such records")
        must_fit = False
    if empty:
        left_out.append(f"{name}: {empty:,} records with an empty text")
    if not texts:
        raise FormatError(
            f"{name} contains no record with a text under {text_key!r}; give another --text-key"
        )
    return Loaded(texts, records=True, left_out=left_out)


def stdlib_files(root: Path) -> list[Path]:
    """List the modules of the standard library below its directory, in no particular order."""
    return [
        file
        for file in root.rglob("*.py")
        if not _NOT_STDLIB & set(file.relative_to(root).parts) and not file.name.startswith("_sysconfigdata")
    ]


def in_order_of_hash(root: Path, files: list[Path]) -> list[Path]:
    """Sort files by a hash of their paths below root: a reproducible order that mixes all topics."""
    return sorted(
        files, key=lambda file: hashlib.sha256(os.fsencode(file.relative_to(root).as_posix())).digest()
    )


def _hold_out(name: str, loaded: Loaded) -> Corpus:
    """Hold out whole documents from the end until they amount to HELD_OUT of the text."""
    texts, more = loaded.texts, (loaded.records, loaded.left_out)
    if len(texts) < _ENOUGH_FILES:
        cuts = [len(text) - max(1, int(len(text) * _HELD_OUT_OF_A_FILE)) for text in texts]
        return Corpus(
            name,
            [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
            [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
            *more,
        )
    wanted = HELD_OUT * sum(map(len, texts))
    split = len(texts)
    while split > 1 and sum(map(len, texts[split:])) < wanted:
        split -= 1
    return Corpus(name, texts[:split], texts[split:], *more)
