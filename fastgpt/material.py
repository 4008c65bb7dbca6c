"""What a run learns from and is measured on: the data that `--data` names, as tokens and batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fastgpt import data
from fastgpt.config import TrainConfig
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer, make_tokenizer

_ENTROPY_TOKENS = 1 << 24  # of the held-out text, enough for its entropy


@dataclass(frozen=True)
class Material:
    """Training and held-out data of a run.

    entropy: the unigram entropy of the held-out text, in nats a token.
    digest:  of the training data: whether a checkpoint was trained on the same.
    """

    tokenizer: ByteTokenizer | BPETokenizer
    train: data.Source
    val: data.Source
    train_size: int
    val_size: int
    entropy: float
    digest: str
    kind: str


def open_material(config: TrainConfig, tokenizer: ByteTokenizer | BPETokenizer | None = None) -> Material:
    """The data of a configuration, in a checkpoint's tokenizer if it goes on from one.

    Raises OSError for what cannot be read, ValueError for what cannot be trained on.
    """
    corpus = data.load_corpus(config.data)
    if tokenizer is None:
        tokenizer = make_tokenizer(config.tokenizer, corpus.train, config.vocab_size)
    if config.packing == "documents":
        return _documents(config, corpus, tokenizer)
    train, val = (tokenizer.encode("".join(texts)) for texts in (corpus.train, corpus.val))
    for part, tokens in (("training", train), ("held-out", val)):
        if len(tokens) <= config.block_size:
            raise ValueError(
                f"the {part} text of {corpus.name} is {len(tokens)} tokens long, "
                f"too short for block_size={config.block_size}"
            )
    sizes = {"batch_size": config.batch_size, "block_size": config.block_size}
    return Material(
        tokenizer=tokenizer,
        train=data.Stream(train, seed=config.seed, **sizes),
        val=data.Stream(val, **sizes),
        train_size=len(train),
        val_size=len(val),
        entropy=data.unigram_entropy(val[:_ENTROPY_TOKENS]),
        digest=hashlib.sha256(train.numpy().tobytes()).hexdigest(),
        kind="stream",
    )
