"""Duplicates among documents that stream by: exact ones by a hash, near ones by MinHash. No text is kept.

Near duplicates: the Jaccard similarity of two documents' sets of shingles (five words in a row) is estimated from 128
minima of hashes each (Broder 1997); locality-sensitive hashing finds the earlier documents worth comparing (Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, chapter 3). By the package datasketch.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from itertools import islice
from typing import Any

import numpy as np

SHINGLE_WORDS = 5
_PERMUTATIONS = 128
_RECALL = 0.99  # of pairs exactly as similar as the threshold, the share that is compared
_AT_ONCE = 4096  # shingles: datasketch takes 128 numbers for each
# A word, or one character of a script that is written without spaces: Thai, Kana, Han.
_SPACELESS = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


def digest(text: str) -> bytes:
    """16 bytes that stand for a text (BLAKE2b); white space around it does not count."""
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()


class ExactDuplicates:
    """Recognises texts it has seen, in 90 to 160 bytes of memory each."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def seen(self, key: bytes) -> bool:
        """Whether a text of this `digest` has been here before; from now on it has."""
        before = len(self._seen)
        self._seen.add(key)
        return len(self._seen) == before


class NearDuplicates:
    """Recognises texts like those it has kept, in about 8 kB of memory each at a threshold of 0.8 (5 kB at 0.9,
    14 kB at 0.5).

    Args:
        threshold: the Jaccard similarity, in (0, 1], from which on two texts are near duplicates. It is estimated,
            with a standard error of at most 0.044 (0.035 at 0.8).

    Raises ValueError for another threshold, and ImportError where datasketch is missing.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold of near duplicates must lie in (0, 1], not {threshold}")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ImportError(
                "near duplicates are found by the package datasketch: pip install 'fastgpt[data]'"
            ) from None
        self._threshold = threshold
        self._empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
        self._signatures: list[Any] = []

    def seen(self, text: str) -> bool:
        """Whether a text is like one that was kept; if it is not, it is kept: its signature, not its words."""
        sketch = self._empty.copy()
        shingles = iter(shingles_of(text))
        while some := list(islice(shingles, _AT_ONCE)):
            sketch.update_batch(some)
        signature = sketch.hashvalues.astype(np.uint32)
        for candidate in self._index.query(sketch):
            if np.mean(self._signatures[candidate] == signature) >= self._threshold:
                return True
        self._index.insert(len(self._signatures), sketch, check_duplication=False)
        self._signatures.append(signature)
        return False


def shingles_of(text: str) -> set[bytes]:
    """The runs of SHINGLE_WORDS words in a text, without case and punctuation; of a shorter text, all of it."""
    words = _WORD.findall(text.casefold())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[i : i + SHINGLE_WORDS]).encode("utf-8", "surrogatepass") for i in range(last)}


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, rows): two signatures are compared if all rows of a band agree; the fewest bands with _RECALL."""
    choices = ((_PERMUTATIONS // rows, rows) for rows in range(_PERMUTATIONS // 2, 0, -1))
    return next(
        ((bands, rows) for bands, rows in choices if 1 - (1 - threshold**rows) ** bands >= _RECALL),
        (_PERMUTATIONS, 1),
    )
