"""Datasets: reading, cleaning, tokenization, packing and batches."""

from fastgpt.data.batches import Batch, Packed, Source, Stream, Tokens, batch, unigram_entropy, windows
from fastgpt.data.corpus import HELD_OUT, Corpus, Loaded, load_corpus, load_documents, read_source, read_text
from fastgpt.data.documents import Documents, are_packed, encode_documents
from fastgpt.data.files import can_be_read_once, name_of
from fastgpt.data.formats import format_of
from fastgpt.data.induction import SHORTEST, Repeats
from fastgpt.data.packing import Integers, Packing, pack
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
    "SHORTEST",
    "Batch",
    "Corpus",
    "DatasetError",
    "DatasetWriter",
    "Documents",
    "Integers",
    "Loaded",
    "Packed",
    "Packing",
    "PrepareConfig",
    "Repeats",
    "Report",
    "Source",
    "Stream",
    "TokenDataset",
    "TokenSplit",
    "Tokens",
    "are_packed",
    "batch",
    "can_be_read_once",
    "encode_documents",
    "format_of",
    "is_dataset",
    "load_corpus",
    "load_documents",
    "load_word_vectors",
    "name_of",
    "open_dataset",
    "pack",
    "prepare",
    "read_source",
    "read_text",
    "unigram_entropy",
    "windows",
]
