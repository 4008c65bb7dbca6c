"""Tokens to batches: which windows of a corpus a step trains on."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def batch(tokens: Tensor, step: int, *, batch_size: int, block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Batch number `step`: inputs and targets, both (batch_size, block_size) int64, targets one token ahead.

    The windows are drawn uniformly from tokens (N,), and are a pure function of (seed, step): whoever resumes
    at a step goes on with the batches that an unbroken run would have had.
    """
    draw = random.Random(f"{seed}/{step}")
    starts = [draw.randrange(len(tokens) - block_size) for _ in range(batch_size)]
    return windows(tokens, starts, block_size)


def even_batches(
    tokens: Tensor, count: int, *, batch_size: int, block_size: int
) -> list[tuple[Tensor, Tensor]]:
    """`count` batches as `batch` gives them, windows spread evenly over the tokens: always the same."""
    last = len(tokens) - block_size - 1
    total = count * batch_size
    starts = [i * last // max(1, total - 1) for i in range(total)]
    return [windows(tokens, starts[i : i + batch_size], block_size) for i in range(0, total, batch_size)]


def windows(tokens: Tensor, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    """The windows of tokens (N,) that begin at `starts`, and the same one token on: two (len(starts),
    length).
    """
    picked = torch.stack([tokens[start : start + length + 1] for start in starts]).long()
    return picked[:, :-1].contiguous(), picked[:, 1:].contiguous()


def unigram_entropy(tokens: Tensor) -> float:
    """The entropy of the tokens' frequencies in nats a token; with one token a byte, nats a byte.

    It is the lowest loss that a model without context can have on this text: one that has learned anything
    beyond letter frequencies is below.
    """
    counts = torch.bincount(tokens.long()).double()
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * frequencies.log()).sum())
