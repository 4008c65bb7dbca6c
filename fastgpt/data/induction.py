"""Repeated random words: text that can only be predicted by learning in context.

A row is a word of n distinct tokens, drawn at random, over and over. n is drawn anew for each row, uniformly between
SHORTEST and half a block. What comes first cannot be predicted; from the second pass on the next token is the one that
followed the current token before. Targets before that, and the first one of the second pass, which follows a token that
nothing has followed yet, do not count.

One layer of attention cannot do that: its score of an earlier place depends on the token there, the current token and
their distance, and the token that is wanted is known by none of these, but by what stands before it. Two layers can:
the first writes into each place what stood before it, the second looks for the place before which the current token
stood, an induction head (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
"In-context Learning and Induction Heads"; that one layer needs a size exponentially larger: Sanford et al. 2024). As n
varies, a look at a fixed distance does not help.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.batches import IGNORED, Batch

SHORTEST = 4
_VALIDATION = 1  # tells the random numbers of training batches and of validation batches apart


class Repeats:
    """A source of batches, each a pure function of (seed, its number)."""

    def __init__(self, alphabet: Tensor, *, batch_size: int, block_size: int, seed: int = 0) -> None:
        """alphabet (A,): the token ids that words are made of. Raises ValueError where no word fits a block twice."""
        longest = min(len(alphabet), block_size // 2)
        if longest < SHORTEST:
            raise ValueError(
                f"words of {SHORTEST} distinct tokens, repeated, need an alphabet of as many and a block of "
                f"{2 * SHORTEST}, not {len(alphabet)} and {block_size}"
            )
        self.alphabet, self.longest = alphabet, longest
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed

    def batch(self, number: int, rows: slice = slice(None)) -> Batch:
        return self._rows((self.seed, number), rows)

    def validation_batches(self, count: int, rows: slice = slice(None)) -> list[Batch]:
        return [self._rows((self.seed, number, _VALIDATION), rows) for number in range(count)]

    def _rows(self, key: tuple[int, ...], rows: slice) -> Batch:
        draw = np.random.default_rng(key)
        lengths = draw.integers(SHORTEST, self.longest, size=self.batch_size, endpoint=True)
        text = np.empty((self.batch_size, self.block_size + 1), dtype=np.int64)
        for row, length in enumerate(lengths):
            word = draw.permutation(len(self.alphabet))[:length]
            text[row] = np.resize(word, self.block_size + 1)
        tokens = self.alphabet[torch.from_numpy(text[rows])]
        targets = tokens[:, 1:].clone()
        unknown = torch.arange(1, self.block_size + 1) <= torch.from_numpy(lengths[rows])[:, None]
        return Batch(tokens[:, :-1].contiguous(), targets.masked_fill(unknown, IGNORED))
