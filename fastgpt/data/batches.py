"""Tokens to batches: what a step trains on.

A batch is a pure function of (seed, its number), so that whoever resumes at a step goes on with the batches that an
unbroken run would have had, on any number of processes: each takes its share of the rows.
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

IGNORED = -100  # the target of a place that does not count
_EMPTY = -1  # a block without documents


class Tokens(Protocol):
    """A row of token ids, in memory or on the disk: a tensor (N,), or what slices into tensors like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Inputs and targets, (B, T) int64 each, targets one token ahead; cu_seqlens as in `GPT.forward`."""

    idx: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())

    @property
    def positions(self) -> Tensor:
        """(B, T) int64, the place of each token in its document, from 0; without documents in its row."""
        if self.cu_seqlens is None:
            return torch.arange(self.idx.shape[1], device=self.idx.device).expand_as(self.idx)
        begins = self.cu_seqlens[:-1].long().repeat_interleave(self.cu_seqlens.long().diff())
        return (torch.arange(len(begins), device=begins.device) - begins).view_as(self.idx)

    def to(self, device: torch.device) -> Batch:
        """The same on a device; a GPU copies it when it comes to it, while the host goes on."""
        cu_seqlens = None if self.cu_seqlens is None else _copied_to(self.cu_seqlens, device)
        return Batch(_copied_to(self.idx, device), _copied_to(self.targets, device), cu_seqlens)


def _copied_to(x: Tensor, device: torch.device) -> Tensor:
    # From pageable memory a copy to a GPU makes the host wait until the GPU has done all that it was given before.
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Source(Protocol):
    """What the trainer draws batches from."""

    def batch(self, number: int, rows: slice) -> Batch:
        """Those rows of training batch `number`, 0, 1, …"""
        ...

    def validation_batches(self, count: int, rows: slice) -> list[Batch]:
        """Those rows of each of `count` batches, or of as many as there are, spread evenly: always the same."""
        ...


class Stream:
    """Windows drawn uniformly from tokens that are one stream: documents follow one another and see each other."""

    def __init__(self, tokens: Tokens, *, batch_size: int, block_size: int, seed: int = 0) -> None:
        """Raises ValueError for tokens that do not fill a window."""
        if len(tokens) <= block_size:
            raise ValueError(f"{len(tokens):,} tokens are too few for a block of {block_size:,}")
        self.tokens, self.batch_size, self.block_size, self.seed = tokens, batch_size, block_size, seed

    def batch(self, number: int, rows: slice = slice(None)) -> Batch:
        draw = random.Random(f"{self.seed}/{number}")
        starts = [draw.randrange(len(self.tokens) - self.block_size) for _ in range(self.batch_size)]
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
        """Windows side by side, the last one shorter: every token but the first is a target once."""
        whole, rest = divmod(len(self.tokens) - 1, self.block_size)
        starts = [self.block_size * i for i in range(whole)]
        for i in range(0, whole, self.batch_size):
            yield Batch(*windows(self.tokens, starts[i : i + self.batch_size], self.block_size))
        if rest:
            yield Batch(*windows(self.tokens, [self.block_size * whole], rest))


class Packed:
    """Documents packed into full blocks, in which none sees its neighbour; an epoch has each block once, shuffled."""

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
        """ends (documents,): where each document ends; is_target (N,) bool: whether a token counts as a target.

        Raises ValueError where no document has two tokens.
        """
        self.tokens, self.is_target = tokens, is_target
        self.batch_size, self.seed = batch_size, seed
        self.packing = pack(ends, block_size)
        if not len(self.packing):
            raise ValueError("no document has two tokens, one to predict from the other")

    def batch(self, number: int, rows: slice = slice(None)) -> Batch:
        places = range(number * self.batch_size, (number + 1) * self.batch_size)[rows]
        return self._blocks([self._shuffled(place) for place in places])

    def validation_batches(self, count: int, rows: slice = slice(None)) -> list[Batch]:
        blocks, size = len(self.packing), self.batch_size
        total = min(count * size, blocks)
        chosen = [i * blocks // total for i in range(total)] + [_EMPTY] * (-total % size)
        return [self._blocks(chosen[i : i + size][rows]) for i in range(0, total, size)]

    def sequential(self) -> Iterator[Batch]:
        """Every block once; the last batch may have fewer."""
        blocks = range(len(self.packing))
        for i in range(0, len(blocks), self.batch_size):
            yield self._blocks(list(blocks[i : i + self.batch_size]))

    def _shuffled(self, place: int) -> int:
        """The block at a place in the endless row of shuffled epochs."""
        epoch, place = divmod(place, len(self.packing))
        return int(_permutation(self.seed, epoch, len(self.packing))[place])

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
                wanted = read[1:]
                if self.is_target is not None:
                    wanted = wanted.masked_fill(~self.is_target[start + 1 : start + length + 1], IGNORED)
                targets[row, end : end + length] = wanted
                lengths.append(length)
                end += length
            if end < size:
                lengths.append(size - end)  # the filling is a document of its own
        ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Batch(idx, targets, torch.nn.functional.pad(ends, (1, 0)))


def windows(tokens: Tokens, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    """The windows of tokens (N,) that begin at `starts`, and the same one token on: two (len(starts),
    length).
    """
    picked = torch.stack([tokens[start : start + length + 1] for start in starts]).long()
    return picked[:, :-1].contiguous(), picked[:, 1:].contiguous()


def batch(tokens: Tokens, step: int, *, batch_size: int, block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Batch number `step` of `Stream`: inputs and targets, both (batch_size, block_size) int64."""
    drawn = Stream(tokens, batch_size=batch_size, block_size=block_size, seed=seed).batch(step)
    return drawn.idx, drawn.targets


def unigram_entropy(tokens: Tensor) -> float:
    """The entropy of the tokens' frequencies in nats a token; with one token a byte, nats a byte.

    It is the lowest loss that a model without context can have on this text: one that has learned anything
    beyond letter frequencies is below.
    """
    counts = torch.bincount(tokens.long()).double()
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * frequencies.log()).sum())


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> Integers:
    """The order of the blocks in an epoch; a batch may lie in two."""
    return np.random.default_rng((seed, epoch)).permutation(length)
