"""Preparation of token shards: read, clean, remove duplicates, hold out, encode and write, with a report.

Documents are streamed. Memory grows only with a hash per document, its signature if near duplicates are removed, and
the ends of the documents in the open shard.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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

_BATCH = 1 << 20  # characters per call of the tokenizer, which encodes on all cores
_SAMPLE_PIECE, _SAMPLE_PIECES = 1 << 12, 1 << 12  # characters of a piece, and pieces of the sample
_HELD_OUT_OF_ONE = 0.1  # fraction of a single document, at its end


@dataclass(frozen=True)
class PrepareConfig:
    """Options of `fastgpt data`, except its inputs.

    Raises:
        ValueError: an option is out of range.
    """

    out: str = option("out/data", "directory of the prepared data set")
    overwrite: bool = option(False, "replacement of an existing data set, once the new one is complete")

    text_key: str = option("text", TEXT_KEY, aliases=("--text-field",))
    separator: str = option(
        END_OF_TEXT, "line between the documents of a text file; an empty one: documents end at blank lines"
    )
    skip_broken: bool = option(False, "skipping (and counting) of records without a text")

    normalization: str = option("NFC", "Unicode normalization form", NORMALIZATIONS)
    markup: str = option("auto", "removal of HTML and XML: where detected, always, or never", MARKUP)
    min_chars: int = option(1, "minimum characters per document")
    max_chars: int | None = option(None, "maximum characters per document")
    repetition: str = option(
        "auto",
        "Gopher's repetition rules: for prose, but not for a file that is one document; for all documents; or off",
        REPETITION,
    )
    exact_duplicates: bool = option(True, "removal of exact duplicates")
    near_duplicates: float | None = option(
        None, "removal of near duplicates: minimum Jaccard similarity of five-word shingles, such as 0.8"
    )

    val_share: float = option(0.01, "fraction of the documents to hold out, chosen by a hash of their text")
    tokenizer: str = option(
        "bpe", "bytes, bpe (trained on the data), a tokenizer.json, or a model on the Hub"
    )
    vocab_size: int = option(4096, "vocabulary size of bpe")
    bpe_dropout: float = option(0.0, "probability of dropping a merge in the training split, as augmentation")
    shard_tokens: int = option(SHARD_TOKENS, "tokens per shard")
    seed: int = option(1337, "random seed (tokenizer sample, BPE-dropout)")

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share must be in [0, 1), not {self.val_share}")
        if not 0 <= self.bpe_dropout <= 1:
            raise ValueError(f"bpe_dropout must be in [0, 1], not {self.bpe_dropout}")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ValueError(f"near_duplicates must be in (0, 1], not {self.near_duplicates}")
        if self.vocab_size > MOST_TOKENS:
            raise ValueError(f"vocab_size must be at most {MOST_TOKENS:,}, not {self.vocab_size:,}")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be at least 1, not {self.shard_tokens}")
        if "\n" in self.separator:
            raise ValueError("separator must be a single line")
        self.rules()

    def rules(self) -> Rules:
        """Return the options of cleaning; raises ValueError like `Rules`."""
        return Rules(self.normalization, self.markup, self.min_chars, self.max_chars, self.repetition)


class _Document(NamedTuple):
    text: str
    key: bytes  # digest of the text


def prepare(inputs: Sequence[str], config: PrepareConfig) -> Report:
    """Write the data set `config.out`; its dataset.json contains the report, too.

    A hash of its text decides whether a document is held out, independently of the other documents. If no document is
    held out, the one with the smallest hash is. Of a single document, the last tenth is held out. After an error
    nothing is written, and an existing data set stays.

    Args:
        inputs: inputs as in `Sources`.
        config: the options.

    Raises:
        OSError: an input cannot be read, or the disk is full.
        ValueError: an input is not text, or no document is left.
    """
    started = time.perf_counter()
    check_destination(Path(config.out), config.overwrite)
    once = [name_of(source) for source in inputs if can_be_read_once(source)]
    if once and config.tokenizer == "bpe":
        raise ValueError(
            f"{once[0]} can be read only once, and --tokenizer bpe reads the text twice; use --tokenizer bytes or "
            "the path of a tokenizer, or write the text to a file first"
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
        # `tokenizers` releases the GIL, so that the next batch is cleaned during the encoding.
        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(write, [])
            for batch in _batches(documents):
                writing.result()
                writing = thread.submit(write, batch)
            writing.result()
        if not report.documents:
            raise ValueError(
                f"no document is left of {report.read} read{_reasons(report)}; relax the options, or give other inputs"
                + _advice(report)
            )
        report.seconds = time.perf_counter() - started
        writer.finish(report.as_dict())
    report.seconds = time.perf_counter() - started
    return report


def _sample(inputs: Sequence[str], config: PrepareConfig) -> list[str]:
    """Sample pieces of clean training documents for the training of a BPE tokenizer.

    The sample is all of a small corpus, and a uniform sample of bounded size of a large one (Vitter 1985, algorithm R).
    """
    if config.tokenizer != "bpe":
        return []
    rng = random.Random(config.seed)
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
            elif (index := rng.randrange(seen)) < _SAMPLE_PIECES:
                pieces[index] = piece
    return pieces


def _clean_documents(
    inputs: Sequence[str], config: PrepareConfig, report: Report, description: str
) -> Iterator[_Document]:
    """Yield the documents that cleaning keeps, and count all of them in the report."""
    sources = Sources(inputs, config.text_key, config.separator, config.skip_broken, report)
    rules = config.rules()
    # Gopher's rules are for pages of the web, not for a whole book.
    lenient = replace(rules, repetition="keep") if rules.repetition == "auto" else rules
    bar = Progress(desc=description, total=sources.size(), unit="B", unit_scale=True)
    with contextlib.closing(bar):
        for text, is_file in sources.documents():
            size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            report.read += 1
            report.bytes += size
            bar.advance(size)
            cleaned = clean(text, lenient if is_file else rules)
            if cleaned.dropped:
                report.drop(cleaned.dropped, cleaned.text or text)
                continue
            for change in cleaned.changes:
                count(report.changed, change)
            yield _Document(cleaned.text, digest(cleaned.text))


def _kept(
    inputs: Sequence[str], config: PrepareConfig, report: Report, near: NearDuplicates | None
) -> Iterator[_Document]:
    """Yield the clean documents that are not duplicates, and count all of them in the report."""
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
    """Yield each document with its split.

    The training document with the smallest hash so far is delayed until another document is held out.
    """
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
    """Group documents into batches of at least _BATCH characters."""
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


def _advice(report: Report) -> str:
    if not any(reason.startswith("repeated") for reason in report.dropped):
        return ""
    return ". --repetition keep keeps repetitive documents; --separator '' makes each paragraph a document"


def _reasons(report: Report) -> str:
    found = [f"{number} {reason}" for reason, number in (report.dropped | report.skipped).items()]
    return f" ({', '.join(found)})" if found else ""
