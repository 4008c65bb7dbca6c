"""Sources of documents, read one at a time: text files, records, directories, pipes, Hugging Face data sets."""

from __future__ import annotations

import io
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastgpt.data.corpus import in_order_of_hash, stdlib_files
from fastgpt.data.files import (
    COMPRESSED,
    NotTextError,
    can_be_read_once,
    name_of,
    open_bytes,
    open_text,
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
from fastgpt.data.report import Report

LONGEST = 1 << 22  # characters of a document of a text file; a longer one is split after a line end
END_OF_TEXT = "<|endoftext|>"  # line between the documents of a text file
_HUGGING_FACE = "hf:"
_SHOWN = 5  # skipped files that an error message lists


class RawDocument(NamedTuple):
    """A text before cleaning.

    Attributes:
        text: the text.
        is_file: whether it is all of a named text file, or a part that was cut off for its length: no line of the
            file, so far, was a separator.
    """

    text: str
    is_file: bool = False


@dataclass(frozen=True)
class Sources:
    """Several inputs in their order; see `documents`.

    Attributes:
        inputs: "stdlib", "hf:NAME", "hf:NAME:SPLIT" or "hf:NAME@REVISION:SPLIT", "-" for standard input, a directory,
            or a file: JSON Lines, JSON, CSV, TSV or Parquet by its name, else text; compressed or not.
        text_key: key or column of the text in records; "a.b" for a nested one.
        separator: line between the documents of a text file; "" is a blank line.
        skip_broken: skip records without a text instead of raising ValueError.
        report: counts the skipped lines and files.
    """

    inputs: Sequence[str]
    text_key: str
    separator: str
    skip_broken: bool
    report: Report

    def size(self) -> int | None:
        """Return the total size of the files in bytes, or None if that of one input is unknown."""
        if any(source.startswith(_HUGGING_FACE) or can_be_read_once(source) for source in self.inputs):
            return None
        files = [file for source in self.inputs for file in _files(source)[0]]
        if any(file.suffix.lower() in COMPRESSED for file in files):
            return None
        return sum(file.stat().st_size for file in files)

    def documents(self) -> Iterator[RawDocument]:
        """Yield every text, before cleaning, with one document in memory at a time.

        A document of a text file has at most twice LONGEST characters. A named file must be of its format and not
        empty. In a directory, other files, hidden files and links are skipped and reported.

        Raises:
            OSError: an input cannot be read.
            ValueError: an input is not of its format; the message contains the file's name and the line number.
        """
        for source in self.inputs:
            if source.startswith(_HUGGING_FACE):
                yield from self._hugging_face(source)
                continue
            if can_be_read_once(source):
                yield from self._stream(source)
                continue
            named = source != "stdlib" and not Path(source).is_dir()
            files, left_out = _files(source)
            self.report.left_out += left_out
            for file in files:
                if file.stat().st_size == 0:
                    if named:
                        raise ValueError(f"{file} is empty")
                    self.report.left_out.append(f"{file}: empty")
                    continue
                try:
                    yield from self._file(file, named)
                except (NotTextError, FormatError) as error:
                    if named:
                        raise
                    self.report.skip("no text", str(file))
                    self.report.left_out.append(f"{file}: {reason_of(error, file)}")

    def _stream(self, source: str) -> Iterator[RawDocument]:
        """Read standard input or a pipe, and detect the format from the first bytes."""
        name = name_of(source)
        with open_bytes(source) as stream:
            if not stream.peek(1):
                raise ValueError(f"{name} is empty")
            records = records_of_stream(stream, name)
            if records is not None:
                yield from self._texts(records)
                return
            with text_of_stream(stream, name) as text:
                yield from _text_documents(text, name, self.separator)

    def _file(self, file: Path, named: bool) -> Iterator[RawDocument]:
        kind = format_of(file)
        if kind == TEXT:
            with open_text(file) as text:
                yield from _text_documents(text, str(file), self.separator if named else None)
        else:
            # JSON files and tables of a directory often contain no texts.
            yield from self._texts(
                read_records(file, kind, [self.text_key]), must_fit=not named and kind != JSON_LINES
            )

    def _texts(self, records: Iterator[Record], must_fit: bool = False) -> Iterator[RawDocument]:
        """Yield the texts of records. With must_fit, raise FormatError if the first record has no text."""
        for record in records:
            text = text_of(record, self.text_key)
            if isinstance(text, str):
                yield RawDocument(text)
            elif must_fit:
                raise FormatError(f"{text.location}: {text.problem}")
            else:
                yield from self._broken(f"{text.location}: {text.problem}")
            must_fit = False

    def _hugging_face(self, source: str) -> Iterator[RawDocument]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ImportError(
                "Hugging Face data sets need the package datasets: pip install 'datasets>=4'"
            ) from None
        name, _, split = source.removeprefix(_HUGGING_FACE).partition(":")
        revision = None
        if "@" in name and not Path(name).exists():
            name, _, revision = name.partition("@")
        if not name or revision == "":
            raise ValueError(
                "hf: lacks the name of a data set; give hf:NAME, hf:NAME:SPLIT or hf:NAME@REVISION:SPLIT"
            )
        try:
            records = load_dataset(name, split=split or "train", revision=revision, streaming=True)
            for number, record in enumerate(records, 1):
                yield from self._texts(iter((Record(f"{source}, record {number}", record),)))
        except (OSError, ValueError):
            raise
        except Exception as error:  # the package defines many exceptions of its own
            raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error

    def _broken(self, message: str) -> Iterator[RawDocument]:
        """Report a record without a text, or raise ValueError unless skip_broken is set; yield nothing."""
        if not self.skip_broken:
            raise ValueError(f"{message}; give --skip-broken to skip such records")
        self.report.skip("broken line", message)
        yield from ()


def _files(source: str) -> tuple[list[Path], list[str]]:
    """List the files of an input (of a directory by `in_order_of_hash`), and a line for each skipped file."""
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    left_out: list[str] = []
    if source == "stdlib":
        files = stdlib_files(root)
    elif root.is_dir():
        files, left_out = walk(root)
        if not files:
            reasons = f"; skipped: {', '.join(left_out[:_SHOWN])}" if left_out else ""
            raise ValueError(f"{root} contains no files{reasons}")
    elif root.exists():
        return [root], []
    else:
        raise FileNotFoundError(f"file or directory {root} does not exist")
    return in_order_of_hash(root, files), left_out


def _text_documents(text: io.TextIOBase, name: str, separator: str | None) -> Iterator[RawDocument]:
    """Split a text at lines equal to `separator`; None, for a file of a directory, does not split."""
    lines: list[str] = []
    length, is_file = 0, separator is not None
    while line := text.readline(LONGEST):
        if "\0" in line:
            raise NotTextError(f"{name} is not UTF-8 text: it contains a NUL character")
        ends = separator is not None and line.rstrip("\r\n") == separator
        if ends:
            is_file = False
        else:
            lines.append(line)
            length += len(line)
        if lines and (ends or length >= LONGEST):
            yield RawDocument("".join(lines), is_file)
            lines, length = [], 0
    if lines:
        yield RawDocument("".join(lines), is_file)
