"""Where documents come from, one at a time: files of text and records, directories, pipes, Hugging Face."""

from __future__ import annotations

import io
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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

LONGEST = (
    1 << 22
)  # characters of a text file that are one document at most; a longer one is cut behind a line end
END_OF_TEXT = "<|endoftext|>"  # a line of its own between the documents of a text file
_HUGGING_FACE = "hf:"
_SHOWN = 5  # files of a directory without one that is read


@dataclass(frozen=True)
class Sources:
    """Several inputs in their order; see `documents`.

    Attributes:
        inputs: "stdlib", "hf:NAME", "hf:NAME:SPLIT" or "hf:NAME@REVISION:SPLIT", "-" for standard input, a directory,
            or a file: JSON Lines, JSON, CSV, TSV or Parquet by its name, else text; compressed or not.
        text_key: the key or column of the text in records, "a.b" for one in another.
        separator: the line between the documents of a text file.
        skip_broken: leave out JSON lines without a text instead of ending there.
        report: where lines and files that are left out are counted.
    """

    inputs: Sequence[str]
    text_key: str
    separator: str
    skip_broken: bool
    report: Report

    def size(self) -> int | None:
        """The bytes of all files, None where one input does not say."""
        if any(source.startswith(_HUGGING_FACE) or can_be_read_once(source) for source in self.inputs):
            return None
        files = [file for source in self.inputs for file in _files(source)[0]]
        if any(file.suffix.lower() in COMPRESSED for file in files):
            return None
        return sum(file.stat().st_size for file in files)

    def documents(self) -> Iterator[str]:
        """Every text, unclean. One document at a time is in memory, of a text file at most twice LONGEST characters.

        A file that is named must be of its format and not empty; of a directory, other files are left out and reported,
        hidden ones and links too. Raises OSError and ValueError, with the file's name and the line's number.
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

    def _stream(self, source: str) -> Iterator[str]:
        """Standard input or a pipe, whose format shows in its beginning."""
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

    def _file(self, file: Path, named: bool) -> Iterator[str]:
        kind = format_of(file)
        if kind == TEXT:
            with open_text(file) as text:
                yield from _text_documents(text, str(file), self.separator if named else None)
        else:
            # Below a directory a JSON file or a table may be about something else than texts.
            yield from self._texts(
                read_records(file, kind, [self.text_key]), must_fit=not named and kind != JSON_LINES
            )

    def _texts(self, records: Iterator[Record], must_fit: bool = False) -> Iterator[str]:
        """The texts of records; the first one must have a text where that decides whether the file is of use."""
        for record in records:
            text = text_of(record, self.text_key)
            if isinstance(text, str):
                yield text
            elif must_fit:
                raise FormatError(f"{text.place}: {text.problem}")
            else:
                yield from self._broken(f"{text.place}: {text.problem}")
            must_fit = False

    def _hugging_face(self, source: str) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ImportError(
                "Hugging Face data sets are read by the package datasets: pip install 'fastgpt[data]'"
            ) from None
        name, _, split = source.removeprefix(_HUGGING_FACE).partition(":")
        revision = None
        if "@" in name and not Path(name).exists():
            name, _, revision = name.partition("@")
        if not name or revision == "":
            raise ValueError("hf: names no data set; give hf:NAME, hf:NAME:SPLIT or hf:NAME@REVISION:SPLIT")
        try:
            records = load_dataset(name, split=split or "train", revision=revision, streaming=True)
            for number, record in enumerate(records, 1):
                yield from self._texts(iter((Record(f"{source}, record {number}", record),)))
        except (OSError, ValueError):
            raise
        except Exception as error:  # the package has many of its own
            raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error

    def _broken(self, sentence: str) -> Iterator[str]:
        """Nothing, or the end: a line that gives no text."""
        if not self.skip_broken:
            raise ValueError(f"{sentence}; --skip-broken leaves such lines out")
        self.report.skip("broken line", sentence)
        yield from ()


def _files(source: str) -> tuple[list[Path], list[str]]:
    """The files of an input, those of a directory ordered by `in_order_of_hash`, and a line for each file left out."""
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    left_out: list[str] = []
    if source == "stdlib":
        files = stdlib_files(root)
    elif root.is_dir():
        files, left_out = walk(root)
        if not files:
            reasons = f"; left out: {', '.join(left_out[:_SHOWN])}" if left_out else ""
            raise ValueError(f"{root} holds no files{reasons}")
    elif root.exists():
        return [root], []
    else:
        raise FileNotFoundError(f"there is no file or directory {root}")
    return in_order_of_hash(root, files), left_out


def _text_documents(text: io.TextIOBase, name: str, separator: str | None) -> Iterator[str]:
    """The documents of a text, split at lines equal to `separator`; the whole text if it is None."""
    lines: list[str] = []
    length = 0
    while line := text.readline(LONGEST):
        if "\0" in line:
            raise NotTextError(f"{name} is not UTF-8 text: it holds a NUL")
        ends = separator is not None and line.rstrip("\r\n") == separator
        if not ends:
            lines.append(line)
            length += len(line)
        if lines and (ends or length >= LONGEST):
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)
