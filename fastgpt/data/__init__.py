"""Text in, batches out."""

from fastgpt.data.batches import Batch, Packed, Source, Stream, Tokens, batch, unigram_entropy, windows
from fastgpt.data.corpus import HELD_OUT, Corpus, load_corpus, read_text
from fastgpt.data.packing import Packing, pack
from fastgpt.data.word_vectors import load_word_vectors

__all__ = [
    "HELD_OUT",
    "Batch",
    "Corpus",
    "Packed",
    "Packing",
    "Source",
    "Stream",
    "Tokens",
    "batch",
    "load_corpus",
    "load_word_vectors",
    "pack",
    "read_text",
    "unigram_entropy",
    "windows",
]
