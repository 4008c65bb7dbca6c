"""Pretrained word vectors, from the text files of GloVe and fastText into a model's token embedding.

    vectors = load_word_vectors("glove.6B.300d.txt", tokenizer.words())
    print(vectors.into(model, tokenizer.words()))  # how many words were found

A line is a word and its D numbers, parted by spaces. fastText (and word2vec's text format) puts a line "count D" in
front, GloVe none (https://fasttext.cc/docs/en/english-vectors.html, https://nlp.stanford.edu/projects/glove/). In
glove.840B words have spaces in them (". . ."), so a line's last D fields are its numbers, what is before them its word.
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
    """What `WordVectors.into` did; prints as a sentence.

    found:      words of the vocabulary whose row was written.
    missing:    the others; their rows are as they were.
    vocabulary: both.
    """

    found: int
    missing: int
    vocabulary: int

    def __str__(self) -> str:
        share = self.found / max(1, self.vocabulary)
        return (
            f"{self.found:,} of {self.vocabulary:,} words found ({share:.1%}), "
            f"{self.missing:,} missing, which keep the rows they had"
        )


@dataclass(frozen=True)
class WordVectors:
    """Words, each once, and their vectors: matrix (len(words), D) float32."""

    words: list[str]
    matrix: Tensor

    def into(self, model: nn.Module, vocabulary: Sequence[str]) -> Placed:
        """Writes the vectors into the rows of a token embedding, in place; tied weights stay tied.

        Args:
            model: an `nn.Embedding`, a `fastgpt.model.GPT`, or a model with `get_input_embeddings` (transformers); its
                embedding is as wide as the vectors, of any dtype and on any device.
            vocabulary: the word of each token id, as `tokenizer.words()` gives them. Several ids may have the
                same word. Rows beyond it are left as they are.

        Returns:
            The counts. Words without a vector keep the rows that they have.

        Raises:
            TypeError: the model has no token embedding that can be found, or vocabulary is one string.
            ValueError: the widths differ, the vocabulary is larger than the embedding, or its weights have no data.
        """
        weight = _token_embedding(model).weight
        if isinstance(vocabulary, str):
            raise TypeError("vocabulary must be a sequence with one word a token id, got one string")
        if weight.is_meta:
            raise ValueError("the embedding is on the meta device, without data; materialise the model first")
        rows, width = weight.shape
        if width != self.matrix.shape[1]:
            raise ValueError(
                f"the vectors have {self.matrix.shape[1]} numbers a word and the embedding is {width} wide; "
                f"take vectors of {width} numbers or a model that is {self.matrix.shape[1]} wide"
            )
        if len(vocabulary) > rows:
            raise ValueError(
                f"the vocabulary has {len(vocabulary)} words and the embedding {rows} rows; "
                "is it the vocabulary of another model?"
            )
        places = {word: place for place, word in enumerate(self.words)}
        pairs = [(row, places[word]) for row, word in enumerate(vocabulary) if word in places]
        if pairs:
            ids, sources = torch.tensor(pairs).unbind(1)
            with torch.no_grad():
                weight.index_copy_(0, ids.to(weight.device), self.matrix[sources].to(weight))
        return Placed(len(pairs), len(vocabulary) - len(pairs), len(vocabulary))


def load_word_vectors(path: str | Path, words: Iterable[str] | None = None) -> WordVectors:
    """The vectors in a text file of GloVe's or fastText's, which may be compressed by gzip.

    The file is read as a stream, and of it only what is asked for is kept; when all words asked for are found, the
    rest is not read. Of a word that stands in it twice the first vector counts. A word that is not UTF-8 has U+FFFD
    in place of what cannot be read.

    Args:
        words: the words wanted, in any order; empty ones are no words. None for all that the file has.

    Returns:
        The words in the file's order, and their vectors.

    Raises:
        OSError: the file cannot be read; FileNotFoundError where there is none.
        TypeError: words is one string.
        ValueError: the file is empty, cut short, or not of this format; a line lacks numbers or has others than
            finite ones. The message names the line.
    """
    path = Path(path)
    if isinstance(words, str):
        raise TypeError(f"words must be several words, got the string {words!r}; write [{words!r}]")
    wanted = None if words is None else {word.encode("utf-8", "replace") for word in words if word}
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            return _read(_lines(_unpacked(file, path), path), path, wanted)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def _unpacked(file: BinaryIO, path: Path) -> BinaryIO:
    """The text of the file; what it is shows in its first bytes, whatever its name."""
    start = file.read(4)
    file.seek(0)
    if start == _ZIP:
        raise ValueError(f"{path} is a zip archive; unpack it and name one of the files in it")
    if start == _FASTTEXT_BINARY:
        raise ValueError(
            f"{path} is a binary model of fastText; take the text file of vectors (.vec) instead"
        )
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
    # Most lines are not asked for: their first field, up to a space, says so without taking them apart.
    beginnings = None if wanted is None else {word.partition(b" ")[0] for word in wanted}
    numbers, found, count = array("f"), dict[bytes, None](), 0
    for number, line in numbered if promised is not None else chain([first], numbered):
        count += 1
        if line.count(b" ") < size:
            have = f"there are {line.count(b' ') + 1} fields"
            raise ValueError(f"{path}, line {number}: a word and {size} numbers are expected, {have}")
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
                f"{path} promises {promised} words in its first line and has {count}; was it cut short?"
            )
    matrix = (
        torch.frombuffer(numbers, dtype=torch.float32).view(-1, size) if numbers else torch.empty(0, size)
    )
    # Decoded, two words that are not UTF-8 may be the same: again the first counts.
    places: dict[str, int] = {}
    for place, word in enumerate(found):
        places.setdefault(word.decode("utf-8", "replace"), place)
    return WordVectors(list(places), matrix if len(places) == len(found) else matrix[list(places.values())])


def _lines_with_fields(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number, line) without its end and the file's byte order mark; empty ones left out. Only spaces part fields:
    words may hold others.
    """
    for number, line in enumerate(lines, 1):
        stripped = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip(b" \r\n")
        if stripped:
            yield number, stripped


def _header(line: bytes) -> tuple[int | None, int]:
    """(count, D) of the line that fastText puts in front, or (None, 0)."""
    fields = line.split(b" ")
    if len(fields) == 2 and all(field.isdigit() for field in fields) and int(fields[1]) > 0:
        return int(fields[0]), int(fields[1])
    return None, 0


def _width(line: bytes, path: Path) -> int:
    """D of a file without a header: how many numbers its first line ends with."""
    fields = line.split(b" ")
    width = 0
    while width < len(fields) - 1 and _is_number(fields[-1 - width]):
        width += 1
    if width == 0:
        raise ValueError(
            f"{path}, line 1: a word and its numbers are expected, got {_shown(line)}; "
            "is it a text file of word vectors?"
        )
    return width


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return b"_" not in field  # 1_0 is a number in Python alone


def _numbers(fields: list[bytes], word: bytes, number: int, path: Path) -> array[float]:
    try:
        values = array("f", map(float, fields))
        if b"_" in b"".join(fields):
            raise ValueError
    except ValueError:
        wrong = next(field for field in fields if not _is_number(field))
        raise ValueError(f"{path}, line {number}: {_shown(wrong)} of {_shown(word)} is no number") from None
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{path}, line {number}: the vector of {_shown(word)} holds NaN or infinity")
    return values


def _shown(field: bytes) -> str:
    text = field.decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _token_embedding(model: Any) -> nn.Embedding:
    """The embedding of the tokens: the model itself, what it calls its input embeddings, or a GPT's `wte`."""
    if isinstance(model, nn.Embedding):
        return model
    find = getattr(model, "get_input_embeddings", None)
    found = find() if callable(find) else getattr(model, "wte", None)
    if isinstance(found, nn.Embedding):
        return found
    raise TypeError(
        f"no token embedding is known of a {type(model).__name__}; give its nn.Embedding instead of the model"
    )
