"""Loss and perplexity of a checkpoint on a text: `fastgpt eval`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import data
from fastgpt.backends import use_backend
from fastgpt.checkpoints.load import open_trained
from fastgpt.checkpoints.native import CheckpointError
from fastgpt.console import note
from fastgpt.data import Batch
from fastgpt.data.batches import IGNORED
from fastgpt.data.packing import PACKINGS
from fastgpt.data.report import left_out_lines
from fastgpt.device import resolve_device
from fastgpt.json_io import finite, shown
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Bucket:
    """Mean loss of a range of positions.

    Attributes:
        first: first position (from 1) in the window.
        last: last position.
        loss: mean loss of the targets, in nats per token.
        tokens: number of targets.
    """

    first: int
    last: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Losses of a text.

    Attributes:
        loss: mean loss in nats per token.
        perplexity: exp(loss), infinite above 709 nats.
        bits_per_byte: comparable between models with different tokenizers.
        unigram_entropy: entropy of the token frequencies, in nats per token.
        tokens: number of targets.
        packing: "documents" or "stream".
        positions: loss by position.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    unigram_entropy: float
    tokens: int
    packing: str
    positions: list[Bucket]

    def as_dict(self) -> dict[str, Any]:
        """Return the results as values for JSON; an infinite perplexity is None."""
        return finite(asdict(self))

    def table(self) -> str:
        """Format the results as a table."""
        lines = [
            f"loss        {self.loss:.4f} nats/token",
            f"perplexity  {self.perplexity:.3f}",
            f"bits/byte   {self.bits_per_byte:.4f}",
            f"tokens      {self.tokens:,} (unigram entropy {self.unigram_entropy:.4f} nats/token)",
            f"read as     {'packed documents' if self.packing == 'documents' else 'one stream'}",
            "",
            "position     loss      tokens",
        ]
        for bucket in self.positions:
            span = f"{bucket.first}" if bucket.first == bucket.last else f"{bucket.first}-{bucket.last}"
            lines.append(f"{span:<11}  {bucket.loss:.4f}  {bucket.tokens:>8,}")
        return "\n".join(lines)


def evaluate(
    checkpoint: str | Path,
    source: str,
    *,
    packing: str = "auto",
    text_key: str = "text",
    skip_broken: bool = False,
    device: str = "auto",
    backend: str = "auto",
) -> Evaluation:
    """Evaluate a model on a text, in float32, with every target once, in blocks of the length used in training.

    Packed documents do not attend to each other, their ends of text are targets, and a position counts from the
    beginning of its document (or of a piece of a document longer than a block).

    Args:
        checkpoint: the directory of a run (`fastgpt train --out`) or of a Hugging Face GPT-2.
        source: a file, "-" (standard input) or a directory, evaluated completely, or "stdlib" or a prepared data set,
            whose held-out part is evaluated.
        packing: as in `TrainConfig.packing`; "auto" uses that of the run.
        text_key: key or column of the text in records.
        skip_broken: skip records without text.
        device: the device.
        backend: the backend of the kernels.

    Raises:
        CheckpointError: the checkpoint is invalid.
        OSError: the text cannot be read.
        ValueError: the text is invalid or too short.
        FloatingPointError: the loss is not finite.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, not {packing!r}")
    model, tokenizer, options = open_trained(checkpoint)
    block_size = model.config.block_size
    if options is not None:
        packing, block_size = _trained_with(options, packing, block_size)
    resolved_device = resolve_device(device)
    documents, size, packed = _read_documents(source, tokenizer, packing, text_key, skip_broken)
    count = len(documents.tokens)
    if count < 2:
        raise ValueError(f"{data.name_of(source)} has {count} token; give a text of at least two")
    try:
        batches = documents.source(
            packed,
            batch_size=max(1, _TOKENS_AT_ONCE // block_size),
            block_size=block_size if packed else min(block_size, count - 1),
        )
    except ValueError as error:
        raise ValueError(f"{data.name_of(source)} cannot be evaluated: {error}") from None
    with use_backend(backend):
        sums, counts = losses_by_position(model.to(resolved_device).eval(), batches.sequential())
    loss = float(sums.sum() / counts.sum())
    check_loss(loss, checkpoint)
    return Evaluation(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=float(sums.sum()) / math.log(2) / max(1, size),
        unigram_entropy=documents.entropy,
        tokens=int(counts.sum()),
        packing="documents" if packed else "stream",
        positions=_buckets(sums, counts),
    )


def _trained_with(options: dict[str, Any], packing: str, block_size: int) -> tuple[str, int]:
    """Return the packing ("auto": that of the run) and the block size of a run's options.

    Raises CheckpointError for invalid options, which may come from an untrusted checkpoint.
    """
    found, length = options.get("packing"), options.get("block_size")
    if found not in PACKINGS or type(length) is not int or not 1 <= length <= block_size:
        raise CheckpointError(
            f"the options of the checkpoint are invalid: packing {shown(found)}, block_size {shown(length)}"
        )
    return (found if packing == "auto" else packing), length


def check_loss(loss: float, model: object) -> None:
    """Raise FloatingPointError for a loss that is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of {model} is {loss}: its training has diverged; use an older checkpoint"
        )


def _exp(value: float) -> float:
    """Compute the exponential; infinite on overflow."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def read_texts(source: str, text_key: str = "text", skip_broken: bool = False) -> list[str]:
    """Read the documents for an evaluation.

    These are all of a file or directory, and the held-out ones of "stdlib" or a prepared data set.
    """
    return _read_texts(source, text_key, skip_broken).texts


def _read_texts(source: str, text_key: str, skip_broken: bool) -> data.Loaded:
    if data.is_dataset(source):
        dataset = data.open_dataset(source)
        return data.Loaded(list(_decoded(dataset.split("val"), dataset.tokenizer())))
    if source == "stdlib":
        return data.Loaded(data.load_corpus(source).val)
    loaded = data.read_source(source, text_key, skip_broken)
    for line in left_out_lines(loaded.left_out):
        note(line)
    return loaded


def _read_documents(
    source: str, tokenizer: Tokenizer, packing: str, text_key: str, skip_broken: bool
) -> tuple[data.Documents, int, bool]:
    """Read and encode the documents for an evaluation.

    The tokens of a prepared data set are used directly if the model has the same tokenizer.

    Returns:
        The documents, their size in bytes of text, and True if they are packed.
    """
    if data.is_dataset(source):
        dataset, packed = data.open_dataset(source), packing != "stream"
        split, own = dataset.split("val"), dataset.tokenizer()
        if own.serialized() == tokenizer.serialized():
            size = sum(len(text.encode()) for text in _decoded(split, own))
            return data.Documents(split, split.document_ends), size, packed
        texts, ended = list(_decoded(split, own)), packed or tokenizer.end_of_text is not None
    else:
        loaded = _read_texts(source, text_key, skip_broken)
        texts, ended = loaded.texts, data.are_packed(packing, loaded.records, tokenizer)
        packed = ended
    size = sum(len(text.encode()) for text in texts)
    return data.encode_documents(texts, tokenizer, ended=ended), size, packed


def _decoded(split: data.TokenSplit, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of each document."""
    start = 0
    for end in split.document_ends.tolist():
        yield tokenizer.decode(split[start : end - 1])
        start = end


def spans(positions: int) -> list[tuple[int, int]]:
    """Return the ranges 1, 2, 3-4, 5-8, ... as (first, last); each is as long as all before it."""
    found = [(1, 1)]
    while found[-1][1] < positions:
        last = found[-1][1]
        found.append((last + 1, min(2 * last, positions)))
    return found


@torch.no_grad()
def losses_by_position(model: GPT, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Sum the losses at each position in the context, and count them.

    Returns:
        Sums and counts, (block_size,) float64 each. In packed documents a position counts from the start of the
        document.
    """
    block_size = model.config.block_size
    sums, counts = torch.zeros(2, block_size, dtype=torch.float64)
    for batch in batches:
        on_device = batch.to(model.wte.weight.device)
        loss = model(on_device.idx, on_device.targets, cu_seqlens=on_device.cu_seqlens, reduction="none")[1]
        counted = batch.targets != IGNORED
        positions = batch.positions[counted]
        sums += torch.bincount(positions, loss.double().cpu()[counted], block_size)
        counts += torch.bincount(positions, minlength=block_size)
    return sums, counts


def _buckets(sums: Tensor, counts: Tensor) -> list[Bucket]:
    """Aggregate the ranges of positions that have tokens."""
    buckets = []
    for first, last in spans(int((counts > 0).sum())):
        part = slice(first - 1, last)
        number = int(counts[part].sum())
        buckets.append(Bucket(first, last, float(sums[part].sum()) / number, number))
    return buckets
