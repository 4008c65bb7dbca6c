"""BPE-dropout (Provilkov et al. 2020): random segmentations of the same words, as data augmentation.

At every step of the encoding of a word, each possible merge is skipped with probability p, and the best remaining merge
is applied. The package `tokenizers` also implements BPE-dropout, but its random generator cannot be seeded. This
implementation in Python is slower, and a pure function of the seed.
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

_LONGEST = 128  # characters; longer words are split, because merging takes quadratic time


class BPEDropout:
    """Encoder with dropout for a byte-level `BPETokenizer`.

    Args:
        tokenizer: the tokenizer whose merges are dropped.
        rate: the probability p in [0, 1] of dropping a merge; 0 drops none, 1 drops all and leaves single bytes.

    Raises:
        ValueError: the rate is outside [0, 1], or the tokenizer is not a byte-level BPE tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        if not 0 <= rate <= 1:
            raise ValueError(f"the rate of BPE-dropout must be in [0, 1], not {rate}")
        model = json.loads(tokenizer.engine.to_str())["model"] if isinstance(tokenizer, BPETokenizer) else {}
        if model.get("type") != "BPE" or not set(ByteLevel.alphabet()) <= model["vocab"].keys():
            raise ValueError(
                f"BPE-dropout needs a byte-level bpe tokenizer, not {tokenizer.name}; use --tokenizer bpe"
            )
        assert isinstance(tokenizer, BPETokenizer)
        if tokenizer.engine.pre_tokenizer is None:
            raise ValueError(
                "BPE-dropout needs a tokenizer that splits a text into words; use one with a pre-tokenizer"
            )
        self._engine = tokenizer.engine
        self._rate = rate
        self._ids: dict[str, int] = model["vocab"]
        self._rank = {
            tuple(merge.split(" ") if isinstance(merge, str) else merge): rank
            for rank, merge in enumerate(model["merges"])
        }

    def encode(self, text: str, seed: str) -> Tensor:
        """Encode a text into ids, (N,) int32: a pure function of the text, the rate and the seed."""
        if self._engine.normalizer is not None:
            text = guarded(self._engine.normalizer.normalize_str, text)
        draw = random.Random(seed).random
        ids: list[int] = []
        for word, _ in guarded(self._engine.pre_tokenizer.pre_tokenize_str, text):
            for start in range(0, len(word), _LONGEST):
                symbols = self._merged(list(word[start : start + _LONGEST]), draw)
                if not self._ids.keys() >= set(symbols):
                    raise ValueError(
                        "BPE-dropout needs a tokenizer whose vocabulary contains only bytes and their merges; "
                        "use another tokenizer"
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
