"""Detection of exact duplicates (by hash) and near duplicates (by MinHash) in a stream of documents.

No text is kept in memory. The Jaccard similarity of two documents' sets of shingles (five consecutive words) is
estimated from 128 minimum hashes per document (Broder 1997). Locality-sensitive hashing selects the earlier documents
to compare with (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3). The implementation uses the
package datasketch.
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
_RECALL = 0.99  # fraction of the pairs with a similarity equal to the threshold that is compared
_AT_ONCE = 4096  # shingles per update: bounds memory, datasketch allocates 128 numbers for each
# A word, or one character of a script without spaces between words: Thai, Kana, Han.
_SPACELESS = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


def digest(text: str) -> bytes:
    """Hash a text to 16 bytes (BLAKE2b), without leading and trailing white space."""
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()


class ExactDuplicates:
    """Set of digests of the texts seen so far; 90 to 160 bytes of memory per text."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def seen(self, key: bytes) -> bool:
        """Return True if this `digest` was added before; add it."""
        before = len(self._seen)
        self._seen.add(key)
        return len(self._seen) == before


class NearDuplicates:
    """Index of the texts kept so far, for the detection of near duplicates.

    Memory per text is about 8 kB at a threshold of 0.8, 5 kB at 0.9 and 14 kB at 0.5.

    Args:
        threshold: Jaccard similarity in (0, 1] at or above which two texts are near duplicates. Its estimate has a
            standard error of at most 0.044 (0.035 at 0.8).

    Raises:
        ValueError: the threshold is outside (0, 1].
        ImportError: datasketch is missing.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold of near duplicates must be in (0, 1], not {threshold}")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ImportError(
                "the detection of near duplicates needs the package datasketch: pip install datasketch"
            ) from None
        self._threshold = threshold
        self._empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
        self._signatures: list[Any] = []

    def seen(self, text: str) -> bool:
        """Return True if a text is similar to one in the index; otherwise add its signature to the index."""
        sketch = self._empty.copy()
        shingles = iter(shingles_of(text))
        while chunk := list(islice(shingles, _AT_ONCE)):
            sketch.update_batch(chunk)
        signature = sketch.hashvalues.astype(np.uint32)
        for candidate in self._index.query(sketch):
            if np.mean(self._signatures[candidate] == signature) >= self._threshold:
                return True
        self._index.insert(len(self._signatures), sketch, check_duplication=False)
        self._signatures.append(signature)
        return False


def shingles_of(text: str) -> set[bytes]:
    """Split a text into runs of SHINGLE_WORDS words, lower-cased, without punctuation; a shorter text is one run."""
    words = _WORD.findall(text.casefold())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[i : i + SHINGLE_WORDS]).encode("utf-8", "surrogatepass") for i in range(last)}


def _bands(threshold: float) -> tuple[int, int]:
    """Choose the fewest (bands, rows) with a recall of _RECALL at the threshold.

    Two signatures are compared if all rows of at least one band agree.
    """
    choices = ((_PERMUTATIONS // rows, rows) for rows in range(_PERMUTATIONS // 2, 0, -1))
    return next(
        ((bands, rows) for bands, rows in choices if 1 - (1 - threshold**rows) ** bands >= _RECALL),
        (_PERMUTATIONS, 1),
    )
