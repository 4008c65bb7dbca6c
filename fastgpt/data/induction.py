"""Induction task: repeated random words, predictable only by learning in context.

A row repeats one word of n distinct random tokens. n is drawn for each row, uniformly between SHORTEST and half a
block. The first pass is unpredictable. From the second pass on, the next token is the token that followed the previous
occurrence of the current token. Targets of the first pass do not count, nor does the first target of the second pass:
it follows a token that had no successor before.

One attention layer cannot solve the task: its score of an earlier position depends on the token there, the current
token and their distance, whereas the position to copy from is identified by the token before it. Two layers can: the
first writes the preceding token into each position, and the second finds the position that the current token precedes.
This is an induction head (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
"In-context Learning and Induction Heads"; a single layer must be exponentially larger: Sanford et al. 2024). Because n
varies, attention at a fixed distance does not solve the task.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.batches import IGNORED, Batch

SHORTEST = 4
_VALIDATION = 1  # separates the random streams of training and validation batches


class Repeats:
    """Source of batches of repeated words; each batch is a pure function of (seed, number)."""

    def __init__(self, alphabet: Tensor, *, batch_size: int, block_size: int, seed: int = 0) -> None:
        """Store the alphabet and the sizes.

        Args:
            alphabet: (A,), the token ids that words consist of.
            batch_size: rows per batch.
            block_size: positions per row.
            seed: seed of the words.

        Raises:
            ValueError: no word fits into a block twice.
        """
        longest = min(len(alphabet), block_size // 2)
        if longest < SHORTEST:
            raise ValueError(
                f"the induction task needs at least {SHORTEST} distinct tokens and a block_size of {2 * SHORTEST}, "
                f"not {len(alphabet)} and {block_size}"
            )
        self.alphabet, self.longest = alphabet, longest
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed

    def batch(self, number: int, rows: slice = slice(None)) -> Batch:
        return self._rows((self.seed, number), rows)

    def validation_batches(self, count: int, rows: slice = slice(None)) -> list[Batch]:
        return [self._rows((self.seed, number, _VALIDATION), rows) for number in range(count)]

    def _rows(self, key: tuple[int, ...], rows: slice) -> Batch:
        rng = np.random.default_rng(key)
        lengths = rng.integers(SHORTEST, self.longest, size=self.batch_size, endpoint=True)
        text = np.empty((self.batch_size, self.block_size + 1), dtype=np.int64)
        for row, length in enumerate(lengths):
            word = rng.permutation(len(self.alphabet))[:length]
            text[row] = np.resize(word, self.block_size + 1)
        tokens = self.alphabet[torch.from_numpy(text[rows])]
        targets = tokens[:, 1:].clone()
        unpredictable = torch.arange(1, self.block_size + 1) <= torch.from_numpy(lengths[rows])[:, None]
        return Batch(tokens[:, :-1].contiguous(), targets.masked_fill(unpredictable, IGNORED))
