"""Batches of tokens for training and validation.

A batch is a pure function of the seed and its number. A resumed run therefore draws the batches of an uninterrupted
run, on any number of processes: each process takes its own rows.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.packing import Integers, pack

IGNORED = -100  # target of a position that does not count towards the loss
_EMPTY = -1  # stands for a block without documents


class Tokens(Protocol):
    """Token ids in memory or on disk: a tensor (N,), or an object that slices into tensors like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of one step.

    Attributes:
        idx: (B, T) int64, the input tokens.
        targets: (B, T) int64, the next token of each input, or IGNORED.
        cu_seqlens: int32, the boundaries of packed documents, as in `GPT.forward`; None without documents.
    """

    idx: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Number of targets that count towards the loss."""
        return int((self.targets != IGNORED).sum())

    @property
    def positions(self) -> Tensor:
        """Position of each token in its document, or in its row without documents; (B, T) int64."""
        if self.cu_seqlens is None:
            return torch.arange(self.idx.shape[1], device=self.idx.device).expand_as(self.idx)
        begins = self.cu_seqlens[:-1].long().repeat_interleave(self.cu_seqlens.long().diff())
        return (torch.arange(len(begins), device=begins.device) - begins).view_as(self.idx)

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; a copy to a GPU does not block the host."""
        cu_seqlens = None if self.cu_seqlens is None else _copied_to(self.cu_seqlens, device)
        return Batch(_copied_to(self.idx, device), _copied_to(self.targets, device), cu_seqlens)


def _copied_to(x: Tensor, device: torch.device) -> Tensor:
    # A copy from pageable memory to a GPU blocks the host until the GPU has finished all queued work.
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Source(Protocol):
    """Interface of the sources from which the trainer draws batches."""

    def batch(self, number: int, rows: slice) -> Batch:
        """Return the given rows of training batch `number`, counted from 0."""
        ...

    def validation_batches(self, count: int, rows: slice) -> list[Batch]:
        """Return the given rows of at most `count` fixed, evenly spaced batches."""
        ...


class Stream:
    """Windows drawn uniformly from one stream of tokens; attention crosses document boundaries."""

    def __init__(self, tokens: Tokens, *, batch_size: int, block_size: int, seed: int = 0) -> None:
        """Check the number of tokens.

        Raises:
            ValueError: the tokens do not fill one window.
        """
        if len(tokens) <= block_size:
            raise ValueError(
                f"{len(tokens):,} tokens are too few for a block of {block_size:,}; "
                "use more text or a smaller block_size (--block-size)"
            )
        self.tokens, self.batch_size, self.block_size, self.seed = tokens, batch_size, block_size, seed

    def batch(self, number: int, rows: slice = slice(None)) -> Batch:
        rng = random.Random(f"{self.seed}/{number}")
        starts = [rng.randrange(len(self.tokens) - self.block_size) for _ in range(self.batch_size)]
        return Batch(*windows(self.tokens, starts[rows], self.block_size))

    def validation_batches(self, count: int, rows: slice = slice(None)) -> list[Batch]:
        last = len(self.tokens) - self.block_size - 1
        total = count * self.batch_size
        starts = [i * last // max(1, total - 1) for i in range(total)]
        return [
            Batch(*windows(self.tokens, starts[i : i + self.batch_size][rows], self.block_size))
            for i in range(0, total, self.batch_size)
        ]

    def sequential(self) -> Iterator[Batch]:
        """Yield adjacent windows, the last one shorter; every token but the first is a target once."""
        whole, rest = divmod(len(self.tokens) - 1, self.block_size)
        starts = [self.block_size * i for i in range(whole)]
        for i in range(0, whole, self.batch_size):
            yield Batch(*windows(self.tokens, starts[i : i + self.batch_size], self.block_size))
        if rest:
            yield Batch(*windows(self.tokens, [self.block_size * whole], rest))


class Packed:
    """Documents packed into full blocks, without attention between them; an epoch yields each block once, shuffled."""

    def __init__(
        self,
        tokens: Tokens,
        ends: Integers,
        *,
        batch_size: int,
        block_size: int,
        seed: int = 0,
        is_target: Tensor | None = None,
    ) -> None:
        """Pack the documents.

        Args:
            tokens: (N,), the tokens of all documents.
            ends: (documents,), the end of each document in `tokens`.
            batch_size: blocks per batch.
            block_size: positions per block.
            seed: seed of the shuffling.
            is_target: (N,) bool, True for a token that counts as a target; None if all count.

        Raises:
            ValueError: no document has two tokens.
        """
        self.tokens, self.is_target = tokens, is_target
        self.batch_size, self.seed = batch_size, seed
        self.packing = pack(ends, block_size)
        if not len(self.packing):
            raise ValueError(
                "no document has at least two tokens, an input and a target; use longer documents"
            )

    def batch(self, number: int, rows: slice = slice(None)) -> Batch:
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)[rows]
        return self._blocks([self._shuffled(position) for position in positions])

    def validation_batches(self, count: int, rows: slice = slice(None)) -> list[Batch]:
        blocks, size = len(self.packing), self.batch_size
        total = min(count * size, blocks)
        chosen = [i * blocks // total for i in range(total)] + [_EMPTY] * (-total % size)
        return [self._blocks(chosen[i : i + size][rows]) for i in range(0, total, size)]

    def sequential(self) -> Iterator[Batch]:
        """Yield every block once; the last batch may be smaller."""
        blocks = range(len(self.packing))
        for i in range(0, len(blocks), self.batch_size):
            yield self._blocks(list(blocks[i : i + self.batch_size]))

    def _shuffled(self, position: int) -> int:
        """Return the block at a position in the infinite sequence of shuffled epochs."""
        epoch, index = divmod(position, len(self.packing))
        return int(_permutation(self.seed, epoch, len(self.packing))[index])

    def _blocks(self, blocks: list[int]) -> Batch:
        size = self.packing.block_size
        idx = torch.zeros(len(blocks), size, dtype=torch.int64)
        targets = torch.full_like(idx, IGNORED)
        lengths = []
        for row, block in enumerate(blocks):
            end = 0
            for start, length in [] if block == _EMPTY else self.packing.pieces(block):
                read = self.tokens[start : start + length + 1].long()
                idx[row, end : end + length] = read[:-1]
                shifted = read[1:]
                if self.is_target is not None:
                    shifted = shifted.masked_fill(~self.is_target[start + 1 : start + length + 1], IGNORED)
                targets[row, end : end + length] = shifted
                lengths.append(length)
                end += length
            if end < size:
                lengths.append(size - end)  # the padding is a document of its own
        ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Batch(idx, targets, torch.nn.functional.pad(ends, (1, 0)))


def windows(tokens: Tokens, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Cut windows and their targets, which are shifted by one token.

    Args:
        tokens: (N,), the token ids.
        starts: first token of each window.
        length: tokens per window.

    Returns:
        Inputs and targets, (len(starts), length) int64 each.
    """
    picked = torch.stack([tokens[start : start + length + 1] for start in starts]).long()
    return picked[:, :-1].contiguous(), picked[:, 1:].contiguous()


def batch(tokens: Tokens, step: int, *, batch_size: int, block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw batch number `step` of `Stream`: inputs and targets, (batch_size, block_size) int64 each."""
    drawn = Stream(tokens, batch_size=batch_size, block_size=block_size, seed=seed).batch(step)
    return drawn.idx, drawn.targets


def unigram_entropy(tokens: Tensor) -> float:
    """Compute the entropy of the token frequencies in nats per token (per byte for byte tokens).

    No model without context has a lower loss on this text. A lower loss shows that a model uses context.
    """
    counts = torch.bincount(tokens.long()).double()
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * frequencies.log()).sum())


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> Integers:
    """Return the order of the blocks in an epoch. A batch may span two epochs, hence the cache size."""
    return np.random.default_rng((seed, epoch)).permutation(length)
