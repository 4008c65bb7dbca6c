"""Pretrained word vectors: text files of GloVe and fastText, copied into a model's token embedding.

    vectors = load_word_vectors("glove.6B.300d.txt", tokenizer.words())
    print(vectors.into(model, tokenizer.words()))  # how many words were found

A line is a word and its D numbers, separated by spaces. fastText and word2vec's text format start with a line "count
D", GloVe does not (https://fasttext.cc/docs/en/english-vectors.html, https://nlp.stanford.edu/projects/glove/). Words
of glove.840B may contain spaces (". . ."): the last D fields of a line are its numbers, and everything before them is
its word.
"""

from __future__ import annotations

import codecs
import gzip
import math
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

_LONGEST_LINE = 1 << 24  # bytes: a million numbers
_ZIP, _GZIP, _FASTTEXT_BINARY = b"PK\x03\x04", b"\x1f\x8b", b"\xba\x16\x4f\x2f"


@dataclass(frozen=True)
class Placed:
    """Result of `WordVectors.into`; `str` formats it as a message.

    Attributes:
        found: words of the vocabulary whose row was written.
        missing: the other words; their rows are unchanged.
        vocabulary: all words of the vocabulary.
    """

    found: int
    missing: int
    vocabulary: int

    def __str__(self) -> str:
        share = self.found / max(1, self.vocabulary)
        return (
            f"{self.found:,} of {self.vocabulary:,} words found ({share:.1%}), "
            f"{self.missing:,} missing (rows unchanged)"
        )


@dataclass(frozen=True)
class WordVectors:
    """Words and their vectors.

    Attributes:
        words: the words, without duplicates.
        matrix: (len(words), D) float32, their vectors.
    """

    words: list[str]
    matrix: Tensor

    def into(self, model: nn.Module, vocabulary: Sequence[str]) -> Placed:
        """Write the vectors into the rows of a token embedding, in place; tied weights stay tied.

        Args:
            model: an `nn.Embedding`, a `fastgpt.model.GPT`, or a model with `get_input_embeddings` (transformers). The
                width of its embedding must be that of the vectors; dtype and device are arbitrary.
            vocabulary: the word of each token id, as from `tokenizer.words()`. Several ids may have the same word. Rows
                beyond the vocabulary are unchanged.

        Returns:
            The counts. Rows of words without a vector are unchanged.

        Raises:
            TypeError: the model has no token embedding that can be found, or vocabulary is one string.
            ValueError: the widths differ, the vocabulary is larger than the embedding, or its weights have no data.
        """
        weight = _token_embedding(model).weight
        if isinstance(vocabulary, str):
            raise TypeError("vocabulary must be a sequence with one word a token id, got one string")
        if weight.is_meta:
            raise ValueError("the embedding is on the meta device, without data; materialize the model first")
        rows, width = weight.shape
        if width != self.matrix.shape[1]:
            raise ValueError(
                f"the vectors have {self.matrix.shape[1]} dimensions and the embedding has {width}; "
                f"use vectors of {width} dimensions or a model of width {self.matrix.shape[1]}"
            )
        if len(vocabulary) > rows:
            raise ValueError(
                f"the vocabulary has {len(vocabulary)} words and the embedding {rows} rows; "
                "use the vocabulary of this model"
            )
        index = {word: i for i, word in enumerate(self.words)}
        pairs = [(row, index[word]) for row, word in enumerate(vocabulary) if word in index]
        if pairs:
            ids, sources = torch.tensor(pairs).unbind(1)
            with torch.no_grad():
                weight.index_copy_(0, ids.to(weight.device), self.matrix[sources].to(weight))
        return Placed(len(pairs), len(vocabulary) - len(pairs), len(vocabulary))


def load_word_vectors(path: str | Path, words: Iterable[str] | None = None) -> WordVectors:
    """Load vectors from a text file of GloVe or fastText, optionally compressed with gzip.

    The file is streamed, and only the vectors of `words` are kept. Reading stops when all of them are found. The first
    vector of a repeated word counts. Invalid UTF-8 in a word is replaced by U+FFFD.

    Args:
        path: the file.
        words: the words to load, in any order; empty strings are ignored. None loads all words.

    Returns:
        The words in the file's order, and their vectors.

    Raises:
        OSError: the file cannot be read (FileNotFoundError if it does not exist).
        TypeError: words is one string.
        ValueError: the file is empty, truncated, or not of this format, or a line has too few or nonfinite numbers. The
            message contains the line number.
    """
    path = Path(path)
    if isinstance(words, str):
        raise TypeError(f"words must be a sequence of words, got the string {words!r}; use [{words!r}]")
    wanted = None if words is None else {word.encode("utf-8", "replace") for word in words if word}
    if not path.is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    try:
        with path.open("rb") as file:
            return _read(_lines(_unpacked(file, path), path), path, wanted)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None


def _unpacked(file: BinaryIO, path: Path) -> BinaryIO:
    """Return the text stream of a file; compression is detected from the first bytes, not from the name."""
    start = file.read(4)
    file.seek(0)
    if start == _ZIP:
        raise ValueError(f"{path} is a zip archive; unpack it and give one of its files")
    if start == _FASTTEXT_BINARY:
        raise ValueError(f"{path} is a binary model of fastText; use the text file of vectors (.vec) instead")
    return gzip.GzipFile(fileobj=file) if start[:2] == _GZIP else file  # type: ignore[return-value]


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise ValueError(f"{path}, line {number} is longer than {_LONGEST_LINE >> 20} MiB")
        yield line


def _read(lines: Iterable[bytes], path: Path, wanted: set[bytes] | None) -> WordVectors:
    numbered = _lines_with_fields(lines)
    first = next(numbered, None)
    if first is None:
        raise ValueError(f"{path} is empty")
    promised, size = _header(first[1])
    if promised is None:
        size = _width(first[1], path)
    # The first field of a line is enough to reject most lines without splitting them.
    beginnings = None if wanted is None else {word.partition(b" ")[0] for word in wanted}
    numbers, found, count = array("f"), dict[bytes, None](), 0
    for number, line in numbered if promised is not None else chain([first], numbered):
        count += 1
        if line.count(b" ") < size:
            have = f"got {line.count(b' ') + 1} fields"
            raise ValueError(f"{path}, line {number}: expected a word and {size} numbers, {have}")
        if beginnings is not None and line.partition(b" ")[0] not in beginnings:
            continue
        word, *fields = line.rsplit(b" ", size)
        word = word.rstrip(b" ")
        if not word:
            raise ValueError(f"{path}, line {number}: there is no word before the numbers")
        if word in found or (wanted is not None and word not in wanted):
            continue
        found[word] = None
        numbers.extend(_numbers(fields, word, number, path))
        if wanted is not None and len(found) == len(wanted):
            break
    else:
        if promised is not None and count != promised:
            raise ValueError(
                f"{path} has {count} words, and its first line promises {promised}; check whether it is truncated"
            )
    matrix = (
        torch.frombuffer(numbers, dtype=torch.float32).view(-1, size) if numbers else torch.empty(0, size)
    )
    # Two words with invalid UTF-8 may become equal when they are decoded: again the first one counts.
    index: dict[str, int] = {}
    for i, word in enumerate(found):
        index.setdefault(word.decode("utf-8", "replace"), i)
    return WordVectors(list(index), matrix if len(index) == len(found) else matrix[list(index.values())])


def _lines_with_fields(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of nonempty lines, without line end and byte order mark.

    Only spaces separate fields: words may contain other white space.
    """
    for number, line in enumerate(lines, 1):
        stripped = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip(b" \r\n")
        if stripped:
            yield number, stripped


def _header(line: bytes) -> tuple[int | None, int]:
    """Parse the line "count D" at the start of fastText's files; return (None, 0) for another line."""
    fields = line.split(b" ")
    if len(fields) == 2 and all(field.isdigit() for field in fields) and int(fields[1]) > 0:
        return int(fields[0]), int(fields[1])
    return None, 0


def _width(line: bytes, path: Path) -> int:
    """Return D of a file without a header: the count of numbers at the end of its first line."""
    fields = line.split(b" ")
    width = 0
    while width < len(fields) - 1 and _is_number(fields[-1 - width]):
        width += 1
    if width == 0:
        raise ValueError(
            f"{path}, line 1: expected a word and its numbers, got {_shown(line)}; "
            "give a text file of word vectors"
        )
    return width


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return b"_" not in field  # Python alone accepts 1_0 as a number


def _numbers(fields: list[bytes], word: bytes, number: int, path: Path) -> array[float]:
    try:
        values = array("f", map(float, fields))
        if b"_" in b"".join(fields):
            raise ValueError
    except ValueError:
        wrong = next(field for field in fields if not _is_number(field))
        raise ValueError(
            f"{path}, line {number}: {_shown(wrong)} of {_shown(word)} is not a number"
        ) from None
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{path}, line {number}: the vector of {_shown(word)} contains NaN or infinity")
    return values


def _shown(field: bytes) -> str:
    text = field.decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _token_embedding(model: Any) -> nn.Embedding:
    """Return the token embedding: the model itself, its input embeddings, or a GPT's `wte`."""
    if isinstance(model, nn.Embedding):
        return model
    find = getattr(model, "get_input_embeddings", None)
    found = find() if callable(find) else getattr(model, "wte", None)
    if isinstance(found, nn.Embedding):
        return found
    raise TypeError(
        f"cannot find the token embedding of a {type(model).__name__}; pass its nn.Embedding instead of the model"
    )
