"""Text in, batches out."""

from fastgpt.data.batches import batch, even_batches, unigram_entropy, windows
from fastgpt.data.corpus import HELD_OUT, Corpus, load_corpus, read_text
from fastgpt.data.prepare import PrepareConfig, prepare
from fastgpt.data.report import Report
from fastgpt.data.shards import (
    DatasetError,
    DatasetWriter,
    TokenDataset,
    TokenSplit,
    is_dataset,
    open_dataset,
)
from fastgpt.data.word_vectors import load_word_vectors

__all__ = [
    "HELD_OUT",
    "Corpus",
    "DatasetError",
    "DatasetWriter",
    "PrepareConfig",
    "Report",
    "TokenDataset",
    "TokenSplit",
    "batch",
    "even_batches",
    "is_dataset",
    "load_corpus",
    "load_word_vectors",
    "open_dataset",
    "prepare",
    "read_text",
    "unigram_entropy",
    "windows",
]
