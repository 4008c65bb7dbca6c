"""From raw text to token shards: read, clean, drop duplicates, hold out, encode, write; and a report of it all.

Documents stream by. What grows with the corpus is a hash for each document, its signature if near duplicates are looked
for, and where documents end in the open shard.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastgpt.console import Progress
from fastgpt.data.bpe_dropout import BPEDropout
from fastgpt.data.cleaning import MARKUP, NORMALIZATIONS, REPETITION, Rules, clean
from fastgpt.data.duplicates import ExactDuplicates, NearDuplicates, digest
from fastgpt.data.files import can_be_read_once, name_of
from fastgpt.data.report import Report, count
from fastgpt.data.shards import SHARD_TOKENS, DatasetWriter, check_destination
from fastgpt.data.sources import END_OF_TEXT, Sources
from fastgpt.options import TEXT_KEY, option
from fastgpt.tokenizer import make_tokenizer
from fastgpt.tokenizer_json import MOST_TOKENS

_BATCH = 1 << 20  # characters that are encoded together, on all cores
_SAMPLE_PIECE, _SAMPLE_PIECES = 1 << 12, 1 << 12  # characters, and how many of them the tokenizer learns from
_HELD_OUT_OF_ONE = 0.1  # of a single document, its end


@dataclass(frozen=True)
class PrepareConfig:
    """All options of `fastgpt data` but its inputs. Raises ValueError for values that make no data set."""

    out: str = option("out/data", "directory of the prepared data set")
    overwrite: bool = option(False, "replace the data set that is there already, once the new one is whole")

    text_key: str = option("text", TEXT_KEY, aliases=("--text-field",))
    separator: str = option(END_OF_TEXT, "the line between the documents of a text file")
    skip_broken: bool = option(False, "leave out, and count, records without a text")

    normalization: str = option("NFC", "of Unicode", NORMALIZATIONS)
    markup: str = option("auto", "strip HTML and XML where a text holds it, always, or never", MARKUP)
    min_chars: int = option(1, "characters of the shortest document")
    max_chars: int | None = option(None, "characters of the longest document")
    repetition: str = option("auto", "Gopher's rules for prose, for programs too, or for none", REPETITION)
    exact_duplicates: bool = option(True, "drop documents that were there before")
    near_duplicates: float | None = option(
        None, "drop documents that share so much of their five-word shingles (Jaccard) with one before: 0.8"
    )

    val_share: float = option(0.01, "share of the documents that is held out, by a hash of their text")
    tokenizer: str = option(
        "bpe", "bytes, bpe (learned from the data), a tokenizer.json, or a model of the Hub"
    )
    vocab_size: int = option(4096, "tokens that bpe learns")
    bpe_dropout: float = option(
        0.0, "rate at which merges are left out of the training split, as augmentation"
    )
    shard_tokens: int = option(SHARD_TOKENS, "tokens a shard")
    seed: int = option(1337, "of the tokenizer's sample and of BPE-dropout")

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share must lie in [0, 1), not {self.val_share}")
        if not 0 <= self.bpe_dropout <= 1:
            raise ValueError(f"bpe_dropout must lie in [0, 1], not {self.bpe_dropout}")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ValueError(f"near_duplicates must lie in (0, 1], not {self.near_duplicates}")
        if self.vocab_size > MOST_TOKENS:
            raise ValueError(f"vocab_size must be at most {MOST_TOKENS:,}, not {self.vocab_size:,}")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be at least 1, not {self.shard_tokens}")
        if not self.separator or "\n" in self.separator:
            raise ValueError("separator must be one line that is not empty")
        self.rules()

    def rules(self) -> Rules:
        """The part that cleaning needs. Raises ValueError as `Rules` does."""
        return Rules(self.normalization, self.markup, self.min_chars, self.max_chars, self.repetition)


class _Document(NamedTuple):
    text: str
    key: bytes  # its digest


def prepare(inputs: Sequence[str], config: PrepareConfig) -> Report:
    """Write the data set `config.out` from inputs as `Sources` takes them; the report is also in its dataset.json.

    A document is held out if a hash of its text says so, whatever its place and the others; if none is, the one with
    the smallest hash; of a single one, its last tenth.

    Raises OSError and ValueError, in one sentence, for what cannot be read or is no text, where no document is left,
    and for a full disk; then nothing is written, and what was there stays.
    """
    started = time.perf_counter()
    check_destination(Path(config.out), config.overwrite)
    once = [name_of(source) for source in inputs if can_be_read_once(source)]
    if once and config.tokenizer == "bpe":
        raise ValueError(
            f"{once[0]} can be read once, and --tokenizer bpe reads the text twice; take --tokenizer bytes or the path "
            "of a tokenizer, or write the text to a file first"
        )
    near = None if config.near_duplicates is None else NearDuplicates(config.near_duplicates)
    tokenizer = make_tokenizer(config.tokenizer, _sample(inputs, config), config.vocab_size)
    dropout = BPEDropout(tokenizer, config.bpe_dropout) if config.bpe_dropout else None
    report = Report(config.out, vocab_size=tokenizer.vocab_size)
    report.learning_seconds = time.perf_counter() - started
    with DatasetWriter(
        config.out,
        tokenizer,
        seed=config.seed,
        shard_tokens=config.shard_tokens,
        overwrite=config.overwrite,
    ) as writer:

        def write(documents: list[tuple[str, _Document]]) -> None:
            if dropout is None:
                encoded = tokenizer.encode_batch([document.text for _, document in documents])
            else:
                encoded = [
                    dropout.encode(document.text, f"{config.seed}/{document.key.hex()}")
                    if split == "train"
                    else tokenizer.encode(document.text)
                    for split, document in documents
                ]
            for (split, _), ids in zip(documents, encoded, strict=True):
                writer.add(split, ids)
                count(report.documents, split)
                count(report.tokens, split, len(ids) + 1)

        documents = _split(_kept(inputs, config, report, near), config.val_share)
        with ThreadPoolExecutor(
            1
        ) as thread:  # `tokenizers` leaves the interpreter free to clean the next batch
            writing = thread.submit(write, [])
            for batch in _batches(documents):
                writing.result()
                writing = thread.submit(write, batch)
            writing.result()
        if not report.documents:
            raise ValueError(f"no document is left of {report.read} read{_reasons(report)}")
        report.seconds = time.perf_counter() - started
        writer.finish(report.as_dict())
    report.seconds = time.perf_counter() - started
    return report


def _sample(inputs: Sequence[str], config: PrepareConfig) -> list[str]:
    """Pieces of clean documents that are not held out, for bpe to learn from: all of a small corpus, and a fair sample
    of bounded size of a large one (Vitter 1985, algorithm R).
    """
    if config.tokenizer != "bpe":
        return []
    draw = random.Random(config.seed)
    pieces: list[str] = []
    seen = 0
    for document in _clean_documents(inputs, config, Report(config.out), "learning the tokenizer"):
        if _is_held_out(document.key, config.val_share):
            continue
        for start in range(0, len(document.text), _SAMPLE_PIECE):
            piece = document.text[start : start + _SAMPLE_PIECE]
            seen += 1
            if len(pieces) < _SAMPLE_PIECES:
                pieces.append(piece)
            elif (place := draw.randrange(seen)) < _SAMPLE_PIECES:
                pieces[place] = piece
    return pieces


def _clean_documents(
    inputs: Sequence[str], config: PrepareConfig, report: Report, doing: str
) -> Iterator[_Document]:
    """The documents that cleaning leaves, counted."""
    sources = Sources(inputs, config.text_key, config.separator, config.skip_broken, report)
    rules = config.rules()
    bar = Progress(desc=doing, total=sources.size(), unit="B", unit_scale=True)
    with contextlib.closing(bar):
        for text in sources.documents():
            size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            report.read += 1
            report.bytes += size
            bar.advance(size)
            cleaned = clean(text, rules)
            if cleaned.dropped:
                report.drop(cleaned.dropped, cleaned.text or text)
                continue
            for change in cleaned.changes:
                count(report.changed, change)
            yield _Document(cleaned.text, digest(cleaned.text))


def _kept(
    inputs: Sequence[str], config: PrepareConfig, report: Report, near: NearDuplicates | None
) -> Iterator[_Document]:
    """The clean documents of which there was none before, counted."""
    exact = ExactDuplicates() if config.exact_duplicates else None
    for document in _clean_documents(inputs, config, report, "writing tokens"):
        if exact and exact.seen(document.key):
            report.drop("exact duplicate", document.text)
        elif near and near.seen(document.text):
            report.drop("near duplicate", document.text)
        else:
            report.kept += 1
            yield document


def _is_held_out(key: bytes, share: float) -> bool:
    return int.from_bytes(key[:8], "big") < share * 2**64


def _split(documents: Iterable[_Document], share: float) -> Iterator[tuple[str, _Document]]:
    """Each document with its split. Until one is held out, that with the smallest hash waits."""
    waiting: _Document | None = None
    total, found = 0, share == 0
    for document in documents:
        total += 1
        if _is_held_out(document.key, share):
            found = True
            yield "val", document
        elif found or (waiting and waiting.key <= document.key):
            yield "train", document
        else:
            if waiting:
                yield "train", waiting
            waiting = document
        if found and waiting:
            yield "train", waiting
            waiting = None
    if waiting is None:
        return
    if total > 1:
        yield "val", waiting
        return
    cut = len(waiting.text) - int(len(waiting.text) * _HELD_OUT_OF_ONE)
    for split, text in (("train", waiting.text[:cut]), ("val", waiting.text[cut:])):
        if text:
            yield split, waiting._replace(text=text)


def _batches(documents: Iterable[tuple[str, _Document]]) -> Iterator[list[tuple[str, _Document]]]:
    """Documents together, until they have _BATCH characters."""
    batch: list[tuple[str, _Document]] = []
    size = 0
    for split, document in documents:
        batch.append((split, document))
        size += len(document.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reasons(report: Report) -> str:
    found = [f"{number} {reason}" for reason, number in (report.dropped | report.skipped).items()]
    return f" ({', '.join(found)})" if found else ""
