"""Where documents come from, one at a time: text files, directories, JSON Lines, the standard library, Hugging Face."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.data.corpus import hidden, stdlib_files
from fastgpt.data.report import Report

LONGEST = (
    1 << 22
)  # characters of a text file that are one document at most; a longer one is cut behind a line end
END_OF_TEXT = "<|endoftext|>"  # a line of its own between the documents of a text file
_HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class Sources:
    """Several inputs in their order; see `documents`.

    Attributes:
        inputs: "stdlib", "hf:NAME" or "hf:NAME:SPLIT", a *.jsonl file, a directory, a text file.
        text_field: the key of the text in JSON Lines and Hugging Face data sets.
        separator: the line between the documents of a text file.
        skip_broken: leave out JSON lines without a text instead of ending there.
        report: where lines and files that are left out are counted.
    """

    inputs: Sequence[str]
    text_field: str
    separator: str
    skip_broken: bool
    report: Report

    def size(self) -> int | None:
        """The bytes of all files, None where one input does not say."""
        if any(source.startswith(_HUGGING_FACE) for source in self.inputs):
            return None
        return sum(file.stat().st_size for source in self.inputs for file in _files(source))

    def documents(self) -> Iterator[str]:
        """Every text, unclean. One document at a time is in memory, of a text file at most twice LONGEST characters.

        A file that is named must be UTF-8 text and not empty; of a directory, other files are left out and counted,
        hidden ones too. Raises OSError and ValueError, with the file's name and the line's number.
        """
        for source in self.inputs:
            if source.startswith(_HUGGING_FACE):
                yield from self._hugging_face(source)
                continue
            named = source != "stdlib" and not Path(source).is_dir()
            for file in _files(source):
                if file.stat().st_size == 0 and named:
                    raise ValueError(f"{file} is empty")
                try:
                    if file.suffix == ".jsonl":
                        yield from self._json_lines(file)
                    else:
                        yield from _text_documents(file, self.separator if named else None)
                except NotTextError:
                    if named:
                        raise
                    self.report.skip("no text", str(file))

    def _json_lines(self, file: Path) -> Iterator[str]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    yield from self._broken(f"{file}, line {number}: not JSON ({error})")
                    continue
                yield from self._text_of(record, f"{file}, line {number}")

    def _hugging_face(self, source: str) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ImportError(
                "Hugging Face data sets are read by the package datasets: pip install 'fastgpt[data]'"
            ) from None
        name, _, split = source.removeprefix(_HUGGING_FACE).partition(":")
        for number, record in enumerate(load_dataset(name, split=split or "train", streaming=True), 1):
            yield from self._text_of(record, f"{source}, record {number}")

    def _text_of(self, record: Any, place: str) -> Iterator[str]:
        text = record.get(self.text_field) if isinstance(record, dict) else None
        if isinstance(text, str):
            yield text
        else:
            yield from self._broken(f"{place}: there is no text under {self.text_field!r}; see --text-field")

    def _broken(self, sentence: str) -> Iterator[str]:
        """Nothing, or the end: a line that gives no text."""
        if not self.skip_broken:
            raise ValueError(f"{sentence}; --skip-broken leaves such lines out")
        self.report.skip("broken line", sentence)
        yield from ()


class NotTextError(ValueError):
    """A file is not UTF-8 text; the message names it."""


def _files(source: str) -> list[Path]:
    """The files of an input, those of a directory in the order of a hash of their names: the same everywhere, and
    no subject stays together.
    """
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    if source == "stdlib":
        files = stdlib_files(root)
    elif root.is_dir():
        files = [file for file in root.rglob("*") if file.is_file() and not hidden(file.relative_to(root))]
        if not files:
            raise ValueError(f"{root} holds no files")
    elif root.is_file():
        return [root]
    else:
        raise FileNotFoundError(f"there is no file or directory {root}")
    return sorted(files, key=lambda f: hashlib.sha256(f.relative_to(root).as_posix().encode()).digest())


def _text_documents(file: Path, separator: str | None) -> Iterator[str]:
    """The documents of a text file: what lies between lines that are the separator; all of it where that is None."""
    lines: list[str] = []
    length = 0
    try:
        with file.open(encoding="utf-8", newline="") as text:
            while line := text.readline(LONGEST):
                if "\0" in line:
                    raise NotTextError(f"{file} is not UTF-8 text: it holds a NUL")
                ends = separator is not None and line.rstrip("\r\n") == separator
                if not ends:
                    lines.append(line)
                    length += len(line)
                if lines and (ends or length >= LONGEST):
                    yield "".join(lines)
                    lines, length = [], 0
    except UnicodeDecodeError:
        raise NotTextError(f"{file} is not UTF-8 text") from None
    if lines:
        yield "".join(lines)
