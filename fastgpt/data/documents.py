"""Tokenized documents, packed into blocks or concatenated to one stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.batches import Packed, Stream, Tokens, unigram_entropy
from fastgpt.data.packing import Integers
from fastgpt.tokenizer import Tokenizer

_ENTROPY_TOKENS = 1 << 24  # a sample of this size estimates the entropy well enough


@dataclass(frozen=True)
class Documents:
    """Tokens of concatenated documents.

    Attributes:
        tokens: (N,), the token ids.
        ends: (documents,) int64, the end of each document in `tokens`.
        is_target: (N,) bool, True for a token that counts as a target; None if all count.
    """

    tokens: Tokens
    ends: Integers
    is_target: Tensor | None = None

    @property
    def entropy(self) -> float:
        """Unigram entropy of the targets, in nats per token."""
        targets = self.tokens[: min(len(self.tokens), _ENTROPY_TOKENS)]
        return unigram_entropy(targets if self.is_target is None else targets[self.is_target[: len(targets)]])

    def source(self, packed: bool, *, batch_size: int, block_size: int, seed: int = 0) -> Packed | Stream:
        """Create a source of batches.

        Args:
            packed: pack documents into blocks instead of reading one stream.
            batch_size: rows per batch.
            block_size: positions per row.
            seed: seed of the sampling.

        Raises:
            ValueError: there are too few tokens for one row.
        """
        sizes = {"batch_size": batch_size, "block_size": block_size, "seed": seed}
        if packed:
            return Packed(self.tokens, self.ends, is_target=self.is_target, **sizes)
        return Stream(self.tokens, **sizes)


def are_packed(packing: str, records: bool, tokenizer: Tokenizer) -> bool:
    """Return True if documents are packed into blocks.

    "auto" packs records if the tokenizer has an end-of-text token.
    """
    return packing == "documents" or (packing == "auto" and records and tokenizer.end_of_text is not None)


def encode_documents(texts: list[str], tokenizer: Tokenizer, *, ended: bool) -> Documents:
    """Encode documents.

    Args:
        texts: the documents.
        tokenizer: the tokenizer.
        ended: append the end-of-text token to each document; if False, the documents are joined to one text.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    if not ended:
        tokens = tokenizer.encode("".join(texts))
        return Documents(tokens, np.array([len(tokens)]))
    if tokenizer.end_of_text is None:
        raise ValueError(
            "packing='documents' needs a tokenizer with an end of text, such as <|endoftext|>; "
            "use another tokenizer or packing='stream'"
        )
    marked = [torch.cat((t, t.new_tensor([tokenizer.end_of_text]))) for t in tokenizer.encode_batch(texts)]
    return Documents(torch.cat(marked), np.cumsum([len(document) for document in marked]))
