"""Documents as tokens, one behind the other: packed into blocks, or read as one stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.batches import Packed, Stream, Tokens, unigram_entropy
from fastgpt.data.packing import Integers
from fastgpt.tokenizer import Tokenizer

_ENTROPY_TOKENS = 1 << 24  # enough for the entropy


@dataclass(frozen=True)
class Documents:
    """tokens (N,), where each document ends in them, and which of them count as targets, (N,) bool; None: all."""

    tokens: Tokens
    ends: Integers
    is_target: Tensor | None = None

    @property
    def entropy(self) -> float:
        """The unigram entropy of the targets, in nats a token."""
        targets = self.tokens[: min(len(self.tokens), _ENTROPY_TOKENS)]
        return unigram_entropy(targets if self.is_target is None else targets[self.is_target[: len(targets)]])

    def source(self, packed: bool, *, batch_size: int, block_size: int, seed: int = 0) -> Packed | Stream:
        """Their batches. Raises ValueError where there are too few tokens for one."""
        sizes = {"batch_size": batch_size, "block_size": block_size, "seed": seed}
        if packed:
            return Packed(self.tokens, self.ends, is_target=self.is_target, **sizes)
        return Stream(self.tokens, **sizes)


def are_packed(packing: str, records: bool, tokenizer: Tokenizer) -> bool:
    """Whether texts are read as packed documents: as `packing` says, and where it is "auto" those of records, if the
    tokenizer can mark their ends.
    """
    return packing == "documents" or (packing == "auto" and records and tokenizer.end_of_text is not None)


def encode_documents(texts: list[str], tokenizer: Tokenizer, *, ended: bool) -> Documents:
    """Documents with an end of text behind each; or, where they are not to be told apart, their text.

    Raises ValueError for a tokenizer without an end of text.
    """
    if not ended:
        tokens = tokenizer.encode("".join(texts))
        return Documents(tokens, np.array([len(tokens)]))
    if tokenizer.end_of_text is None:
        raise ValueError(
            "packing='documents' needs a tokenizer with an end of text, such as <|endoftext|>; "
            "packing='stream' does without"
        )
    marked = [torch.cat((t, t.new_tensor([tokenizer.end_of_text]))) for t in tokenizer.encode_batch(texts)]
    return Documents(torch.cat(marked), np.cumsum([len(document) for document in marked]))
