"""BPE-dropout (Provilkov et al. 2020): the same words cut in other ways each time, as augmentation.

At every step of a word's encoding each possible merge is left out with probability p, and the best of the others is
done. The package `tokenizers` can do so too, but draws from a generator that cannot be seeded; this one is in Python,
slower, and a pure function of the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastgpt.tokenizer import BPETokenizer, Tokenizer
from fastgpt.tokenizer_json import guarded

_LONGEST = 128  # characters of a word that are merged together; longer ones are cut


class BPEDropout:
    """Encodes with dropout what a byte-level `BPETokenizer` encodes without.

    Args:
        tokenizer: whose merges are dropped.
        rate: p in [0, 1]: 0 leaves out no merge, 1 all of them, so that single bytes remain.

    Raises ValueError for another rate, and for a tokenizer that has no merges of bytes.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        if not 0 <= rate <= 1:
            raise ValueError(f"the rate of BPE-dropout must lie in [0, 1], not {rate}")
        model = json.loads(tokenizer.engine.to_str())["model"] if isinstance(tokenizer, BPETokenizer) else {}
        if model.get("type") != "BPE" or not set(ByteLevel.alphabet()) <= model["vocab"].keys():
            raise ValueError(f"BPE-dropout needs a byte-level bpe tokenizer, not {tokenizer.name}")
        assert isinstance(tokenizer, BPETokenizer)
        if tokenizer.engine.pre_tokenizer is None:
            raise ValueError("BPE-dropout needs a tokenizer that cuts a text into words")
        self._engine = tokenizer.engine
        self._rate = rate
        self._ids: dict[str, int] = model["vocab"]
        self._rank = {
            tuple(merge.split(" ") if isinstance(merge, str) else merge): rank
            for rank, merge in enumerate(model["merges"])
        }

    def encode(self, text: str, seed: str) -> Tensor:
        """The ids of a text, (N,) int32: a pure function of the text, the rate and the seed."""
        if self._engine.normalizer is not None:
            text = guarded(self._engine.normalizer.normalize_str, text)
        draw = random.Random(seed).random
        ids: list[int] = []
        for word, _ in guarded(self._engine.pre_tokenizer.pre_tokenize_str, text):
            for start in range(0, len(word), _LONGEST):
                symbols = self._merged(list(word[start : start + _LONGEST]), draw)
                if not self._ids.keys() >= set(symbols):
                    raise ValueError(
                        "BPE-dropout needs a tokenizer whose words and merges are of bytes alone"
                    )
                ids += (self._ids[symbol] for symbol in symbols)
        return torch.from_numpy(np.array(ids, np.int32))

    def _merged(self, symbols: list[str], draw: Callable[[], float]) -> list[str]:
        while True:
            possible = [
                (rank, i)
                for i, pair in enumerate(pairwise(symbols))
                if (rank := self._rank.get(pair)) is not None and draw() >= self._rate
            ]
            if not possible:
                return symbols
            _, i = min(possible)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
