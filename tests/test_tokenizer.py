"""Tokenizers: lossless, repeatable, and the same after being saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer, make_tokenizer

CORPUS = [
    "def add(a, b):\n    return a + b\n" * 20,
    "für Straße, naïve — 漢字 🎉\r\n\ttabs  and   spaces\n" * 20,
]
BPE = BPETokenizer.train(CORPUS, 320)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@given(text=st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_survives(tokenizer: ByteTokenizer | BPETokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dim() == 1 and (
        ids.numel() == 0 or 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size
    )


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_a_text_of_many_pieces_survives(tokenizer: ByteTokenizer | BPETokenizer):
    for text in ("\n".join(CORPUS) * 100, "x" * 200_000, "\n" * 150_000, CORPUS[1] * 2000 + "no line end"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_are_the_utf8_bytes():
    assert ByteTokenizer().encode("aß").tolist() == list("aß".encode())
    assert ByteTokenizer().decode(torch.tensor([97, 0xC3])) == "a\ufffd"


def test_bpe_learns_merges_that_shorten_its_corpus():
    assert 257 < BPE.vocab_size <= 320
    text = CORPUS[0]
    assert len(BPE.encode(text)) < len(text.encode()) / 2
    again = BPETokenizer.train(CORPUS, 320)
    assert torch.equal(again.encode(text + CORPUS[1]), BPE.encode(text + CORPUS[1]))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_a_saved_tokenizer_is_the_same(tmp_path: Path, tokenizer: ByteTokenizer | BPETokenizer):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = make_tokenizer(str(path), [], 1)
        assert type(loaded) is type(tokenizer) and loaded.vocab_size == tokenizer.vocab_size
        assert torch.equal(loaded.encode(CORPUS[1]), tokenizer.encode(CORPUS[1]))


def test_what_is_no_tokenizer_is_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"takes bytes, bpe or a tokenizer\.json"):
        make_tokenizer(str(tmp_path / "absent.json"), [], 1)
    for content in ("not json", "{}", "[]", '{"type": "words"}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="is not a tokenizer"):
            load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="at least 257"):
        make_tokenizer("bpe", CORPUS, 100)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_a_lone_surrogate_is_no_text(tokenizer: ByteTokenizer | BPETokenizer):
    with pytest.raises(ValueError, match="no character"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_no_text_holds_the_end_of_text(tokenizer: ByteTokenizer | BPETokenizer):
    end = tokenizer.end_of_text
    assert end is not None and 0 <= end < tokenizer.vocab_size
    assert tokenizer.words()[end] == ""
    for text in ("<|endoftext|>", "a <|endoftext|>b", CORPUS[0]):
        ids = tokenizer.encode(text)
        assert end not in ids.tolist() and tokenizer.decode(ids) == text
