"""Documents packed into blocks of one length, none cut that fits, next to nothing wasted.

A document of n tokens has n - 1 places to learn at: there the token is the input, and the next one the target. The
places of a longer document than a block are cut into pieces of a block's length, the last one shorter. All pieces then
go into blocks by best fit, the longest first (best-fit decreasing; for training language models: Ding et al. 2024,
"Fewer Truncations Improve Language Modeling"). What a block has left is filled with places that do not count.

Pieces of a block do not see each other, so that it does not matter which ones share it: blocks are packed once, and
shuffled anew in each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PACKINGS = ("auto", "documents", "stream")  # how documents become batches
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Which pieces of the tokens each block holds.

    first:  (blocks + 1,), block b holds the pieces first[b] to first[b + 1].
    start:  (pieces,), where in the tokens a piece begins.
    length: (pieces,), its places; it reads one token more, the last target.
    """

    block_size: int
    first: Integers
    start: Integers
    length: Integers

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.first) - 1

    def pieces(self, block: int) -> list[tuple[int, int]]:
        """(start, length) of each piece of a block."""
        part = slice(self.first[block], self.first[block + 1])
        return list(zip(self.start[part].tolist(), self.length[part].tolist(), strict=True))

    @property
    def fill(self) -> float:
        """The share of places that count."""
        return float(self.length.sum()) / max(1, len(self) * self.block_size)


def pack(ends: Integers, block_size: int) -> Packing:
    """Pack documents into blocks of block_size places; ends (documents,) says where in the tokens each one ends.

    A document of a single token has nothing to predict and is left out. Always the same for the same documents.
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
    """Start and length of the pieces of all documents, in their order."""
    begins = np.concatenate((np.zeros(1, dtype=np.int64), ends))[:-1]
    places = np.maximum(ends - begins - 1, 0)
    count = -(-places // block_size)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # of a piece in its document
    start = np.repeat(begins, count) + number * block_size
    return start, np.minimum(np.repeat(places, count) - number * block_size, block_size)


def _best_fit(lengths: list[int], block_size: int) -> Integers:
    """The block of each piece, for lengths in descending order."""
    chosen = np.empty(len(lengths), dtype=np.int64)
    roomy: list[list[int]] = [[] for _ in range(block_size + 1)]  # blocks by the places they have left
    rooms = 0  # bit r is set where roomy[r] has a block: the least room that is enough is a shift and a lowest bit
    blocks = 0
    for piece, length in enumerate(lengths):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            block = roomy[room].pop()
            if not roomy[room]:
                rooms &= ~(1 << room)
        else:
            room, block = block_size, blocks
            blocks += 1
        chosen[piece] = block
        if room > length:
            roomy[room - length].append(block)
            rooms |= 1 << (room - length)
    return chosen
