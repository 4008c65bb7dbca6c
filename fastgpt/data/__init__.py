"""Text in, batches out."""

from fastgpt.data.batches import batch, even_batches, unigram_entropy, windows
from fastgpt.data.corpus import HELD_OUT, Corpus, load_corpus, read_text
from fastgpt.data.word_vectors import load_word_vectors

__all__ = [
    "HELD_OUT",
    "Corpus",
    "batch",
    "even_batches",
    "load_corpus",
    "load_word_vectors",
    "read_text",
    "unigram_entropy",
    "windows",
]
