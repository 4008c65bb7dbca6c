"""How well a checkpoint predicts a text: `fastgpt eval`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import data
from fastgpt.backends import use_backend
from fastgpt.config import resolve_device
from fastgpt.model import GPT
from fastgpt.pretrained import open_model

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Bucket:
    """The mean loss of the targets at positions first..last (from 1) of their window; `tokens` of them."""

    first: int
    last: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats a token; `bits_per_byte` compares models with different tokenizers."""

    loss: float
    perplexity: float
    bits_per_byte: float
    unigram_entropy: float
    tokens: int
    positions: list[Bucket]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self)

    def table(self) -> str:
        """The same for people."""
        lines = [
            f"loss        {self.loss:.4f} nats/token",
            f"perplexity  {self.perplexity:.3f}",
            f"bits/byte   {self.bits_per_byte:.4f}",
            f"tokens      {self.tokens:,} (unigram entropy {self.unigram_entropy:.4f} nats/token)",
            "",
            "position     loss      tokens",
        ]
        for bucket in self.positions:
            span = f"{bucket.first}" if bucket.first == bucket.last else f"{bucket.first}-{bucket.last}"
            lines.append(f"{span:<11}  {bucket.loss:.4f}  {bucket.tokens:>8,}")
        return "\n".join(lines)


def evaluate(
    checkpoint: str | Path, source: str, *, device: str = "auto", backend: str = "auto"
) -> Evaluation:
    """Evaluate a model on a text, in float32.

    checkpoint: what `fastgpt train --out` was given, or a Hugging Face GPT-2 directory.
    source:     a file or a directory, evaluated whole, or "stdlib" or a prepared dataset, of which the held-out part
                is evaluated.

    Raises CheckpointError for the checkpoint, OSError and ValueError for the text.
    """
    model, tokenizer = open_model(checkpoint)
    where = resolve_device(device)
    text = read_source(source)
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise ValueError(f"{source} has {len(tokens)} token; predicting one from another takes at least two")
    with use_backend(backend):
        sums, counts = losses_by_position(model.to(where).eval(), tokens)
    loss = float(sums.sum() / counts.sum())
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=float(sums.sum()) / math.log(2) / len(text.encode("utf-8")),
        unigram_entropy=data.unigram_entropy(tokens),
        tokens=int(counts.sum()),
        positions=_buckets(sums, counts),
    )


def read_source(source: str) -> str:
    """The text that a model is measured on: a file or a directory, whole, or the held-out part of "stdlib" or of a
    prepared dataset.
    """
    if data.is_dataset(source):
        dataset = data.open_dataset(source)
        split, tokenizer = dataset.split("val"), dataset.tokenizer()
        ends = split.document_ends.tolist()
        return "".join(
            tokenizer.decode(split[start : end - 1]) for start, end in zip([0, *ends[:-1]], ends, strict=True)
        )
    corpus = data.load_corpus(source)
    return "".join(corpus.val if source == "stdlib" else corpus.train + corpus.val)


def spans(positions: int) -> list[tuple[int, int]]:
    """Positions 1, 2, 3-4, 5-8, … as (first, last): each range as long as all before it."""
    found = [(1, 1)]
    while found[-1][1] < positions:
        last = found[-1][1]
        found.append((last + 1, min(2 * last, positions)))
    return found


@torch.no_grad()
def losses_by_position(model: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For each position in the context the sum of the losses and their number, both (block_size,) float64.

    The tokens (N,) are cut into windows of block_size, the last of them shorter; every token but the first is
    predicted once, from those before it in its window.
    """
    block = model.config.block_size
    device = model.wte.weight.device
    sums, counts = torch.zeros(2, block, dtype=torch.float64)
    whole, rest = divmod(len(tokens) - 1, block)
    starts = [block * i for i in range(whole)]
    at_once = max(1, _TOKENS_AT_ONCE // block)
    groups = [(starts[i : i + at_once], block) for i in range(0, whole, at_once)]
    if rest:
        groups.append(([block * whole], rest))
    for group, length in groups:
        x, y = data.windows(tokens, group, length)
        loss = model(x.to(device), y.to(device), reduction="none")[1]
        sums[:length] += loss.double().sum(dim=0).cpu()
        counts[:length] += len(group)
    return sums, counts


def _buckets(sums: Tensor, counts: Tensor) -> list[Bucket]:
    """The ranges of positions that have tokens."""
    buckets = []
    for first, last in spans(int((counts > 0).sum())):
        part = slice(first - 1, last)
        number = int(counts[part].sum())
        buckets.append(Bucket(first, last, float(sums[part].sum()) / number, number))
    return buckets
