"""Duplicates: all planted ones are found, no others, and memory is bounded by signatures."""

from __future__ import annotations

import random
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data.duplicates import ExactDuplicates, NearDuplicates, digest, shingles_of

RANDOM = random.Random(8)
TEXTS = [" ".join(f"word{RANDOM.randrange(5000)}" for _ in range(200)) for _ in range(150)]


def altered(text: str, words: int) -> str:
    """Change evenly spaced words of a text."""
    parts = text.split()
    for i in range(words):
        parts[(2 * i + 1) * len(parts) // (2 * words)] = "CHANGED"
    return " ".join(parts)


def similarity(a: str, b: str) -> float:
    x, y = shingles_of(a), shingles_of(b)
    return len(x & y) / len(x | y)


@given(st.lists(st.text(max_size=3), max_size=30))
def test_exact_duplicates_are_those_of_a_set(texts: list[str]):
    seen, exact = set(), ExactDuplicates()
    for text in texts:
        assert exact.seen(digest(text)) == (text.strip() in seen)
        seen.add(text.strip())


def test_every_planted_near_duplicate_is_found_and_nothing_else():
    near = NearDuplicates(0.8)
    assert not any(near.seen(text) for text in TEXTS)
    for text in TEXTS:
        close, far = altered(text, 2), altered(text, 18)
        assert similarity(text, close) > 0.9 and similarity(text, far) < 0.5
        assert near.seen(close) and near.seen(text) and near.seen(text.upper().replace(" ", ",\n"))
        assert not near.seen(far)


@pytest.mark.parametrize(("threshold", "found"), [(0.75, 40), (0.4, 80), (1.0, 0)])
def test_the_threshold_is_the_similarity(threshold: float, found: int):
    """Of pairs with similarities 0.95 and 0.57, threshold 0.75 finds half, 0.4 all, and 1 none."""
    count = 0
    for text in TEXTS[:40]:
        for words in (1, 11):
            near = NearDuplicates(threshold)
            assert not near.seen(text)
            count += near.seen(altered(text, words))
    assert count == found


def test_short_texts_and_scripts_without_spaces_have_shingles():
    near = NearDuplicates(0.8)
    for text in ("", "one", "one two", "我们今天去北京看朋友们", "我们明天在上海买东西吃", "ไปไหนมา"):
        assert not near.seen(text) and near.seen(text)
    assert len(shingles_of("我们今天去北京")) == 3


def test_memory_is_a_signature_whatever_the_text():
    """Check the docstrings' figures: 160 bytes per exact duplicate, 8 kB per near one at 0.8."""
    near, exact, long = NearDuplicates(0.8), ExactDuplicates(), "\n".join(TEXTS[:20])
    near.seen("warm up")
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i in range(300):
        near.seen(f"{long[i * 7 : i * 7 + 20_000]} {i}" if i % 2 else f"{RANDOM.random()} " * 5)
    middle = tracemalloc.get_traced_memory()[0]
    for i in range(20_000):
        exact.seen(digest(str(i)))
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (middle - before) / 300 < 9000
    assert (after - middle) / 20_000 < 165


def test_a_wrong_threshold_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch):
    for threshold in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            NearDuplicates(threshold)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ImportError, match=r"pip install datasketch"):
        NearDuplicates(0.8)
