"""Packing of documents into blocks of one length, with few cuts and little padding.

A document of n tokens has n - 1 positions, each with a token as the input and the next one as the target. Documents
with more positions than a block are cut into pieces of a block's length, the last one shorter. All pieces are assigned
to blocks by best-fit decreasing (for language models: Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
The rest of a block is padding that does not count towards the loss.

Pieces do not attend to each other, so it does not matter which ones share a block. Blocks are therefore packed once,
and only their order is shuffled in each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PACKINGS = ("auto", "documents", "stream")  # choices of --packing
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Assignment of pieces of documents to blocks.

    Attributes:
        block_size: positions per block.
        first: (blocks + 1,) int64, block b contains pieces first[b] to first[b + 1] - 1.
        start: (pieces,) int64, the first token of each piece.
        length: (pieces,) int64, the positions of each piece; it reads one more token, the last target.
    """

    block_size: int
    first: Integers
    start: Integers
    length: Integers

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.first) - 1

    def pieces(self, block: int) -> list[tuple[int, int]]:
        """Return (start, length) of each piece of a block."""
        part = slice(self.first[block], self.first[block + 1])
        return list(zip(self.start[part].tolist(), self.length[part].tolist(), strict=True))

    @property
    def fill(self) -> float:
        """Fraction of positions that are not padding."""
        return float(self.length.sum()) / max(1, len(self) * self.block_size)


def pack(ends: Integers, block_size: int) -> Packing:
    """Pack documents into blocks; a deterministic function of its arguments.

    A document with a single token has no target and is left out.

    Args:
        ends: (documents,), the end of each document in the tokens.
        block_size: positions per block.
    """
    start, length = _cut(np.asarray(ends, dtype=np.int64), block_size)
    order = np.argsort(-length, kind="stable")
    start, length = start[order], length[order]
    block = _best_fit(length.tolist(), block_size)
    by_block = np.argsort(block, kind="stable")
    first = (
        np.concatenate(([0], np.cumsum(np.bincount(block)))) if len(block) else np.zeros(1, dtype=np.int64)
    )
    return Packing(block_size, first, start[by_block], length[by_block])


def _cut(ends: Integers, block_size: int) -> tuple[Integers, Integers]:
    """Return start and length of the pieces of all documents, in their order."""
    begins = np.concatenate((np.zeros(1, dtype=np.int64), ends))[:-1]
    positions = np.maximum(ends - begins - 1, 0)
    count = -(-positions // block_size)
    number = np.arange(count.sum()) - np.repeat(
        np.cumsum(count) - count, count
    )  # index of a piece in its document
    start = np.repeat(begins, count) + number * block_size
    return start, np.minimum(np.repeat(positions, count) - number * block_size, block_size)


def _best_fit(lengths: list[int], block_size: int) -> Integers:
    """Return the block of each piece, (pieces,) int64; `lengths` must be in descending order."""
    chosen = np.empty(len(lengths), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(block_size + 1)]  # blocks by the number of free positions
    rooms = 0  # bit r is set if by_room[r] is not empty; the best fit is the lowest bit after a shift
    blocks = 0
    for piece, length in enumerate(lengths):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            block = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, block = block_size, blocks
            blocks += 1
        chosen[piece] = block
        if room > length:
            by_room[room - length].append(block)
            rooms |= 1 << (room - length)
    return chosen
