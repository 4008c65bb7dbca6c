"""Tokenizers: lossless, deterministic, and unchanged by saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine

from fastgpt.data.bpe_dropout import BPEDropout
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, make_tokenizer

CORPUS = [
    "def add(a, b):\n    return a + b\n" * 20,
    "für Straße, naïve — 漢字 🎉\r\n\ttabs  and   spaces\n" * 20,
]
BPE = BPETokenizer.train(CORPUS, 320)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@given(text=st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_survives(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dim() == 1 and (
        ids.numel() == 0 or 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size
    )


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_a_text_of_many_pieces_survives(tokenizer: Tokenizer):
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
def test_a_saved_tokenizer_is_the_same(tmp_path: Path, tokenizer: Tokenizer):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = make_tokenizer(str(path), [], 1)
        assert type(loaded) is type(tokenizer) and loaded.vocab_size == tokenizer.vocab_size
        assert torch.equal(loaded.encode(CORPUS[1]), tokenizer.encode(CORPUS[1]))


def test_what_is_no_tokenizer_is_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"--tokenizer bytes, bpe, a tokenizer\.json"):
        make_tokenizer(str(tmp_path / "absent.json"), [], 1)
    for content in ("not json", "{}", "[]", '{"type": "words"}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="is not a tokenizer"):
            load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="at least 257"):
        make_tokenizer("bpe", CORPUS, 100)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_a_lone_surrogate_is_no_text(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="not a character"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_no_text_holds_the_end_of_text(tokenizer: Tokenizer):
    end = tokenizer.end_of_text
    assert end is not None and 0 <= end < tokenizer.vocab_size
    assert tokenizer.words()[end] == ""
    for text in ("<|endoftext|>", "a <|endoftext|>b", CORPUS[0]):
        ids = tokenizer.encode(text)
        assert end not in ids.tolist() and tokenizer.decode(ids) == text


def test_a_batch_is_each_text_by_itself():
    texts = ["", CORPUS[0], "x", CORPUS[1] * 3000, ""]
    for tokenizer in (ByteTokenizer(), BPE):
        batch = tokenizer.encode_batch(texts)
        assert all(torch.equal(ids, tokenizer.encode(text)) for ids, text in zip(batch, texts, strict=True))
        assert tokenizer.encode_batch([]) == []


def test_gpt2s_files_load_as_transformers_reads_them(tmp_path: Path):
    from transformers import GPT2TokenizerFast

    BPE.engine.model.save(str(tmp_path))  # vocab.json and merges.txt
    ours, theirs = load_tokenizer(tmp_path), GPT2TokenizerFast.from_pretrained(tmp_path)
    for text in (*CORPUS, " leading", "a\n\n b\t", "漢字 🎉"):
        assert (
            ours.encode(text).tolist() == theirs(text)["input_ids"] and ours.decode(ours.encode(text)) == text
        )
    assert ours.name == "bpe" and ours.vocab_size == BPE.vocab_size
    end = ours.end_of_text
    assert end == theirs.convert_tokens_to_ids("<|endoftext|>")
    assert end not in ours.encode("a <|endoftext|> b").tolist()
    ours.save(tmp_path)
    assert torch.equal(load_tokenizer(tmp_path / "tokenizer.json").encode(CORPUS[1]), ours.encode(CORPUS[1]))


@pytest.mark.parametrize("lower", [True, False])
def test_berts_files_load_as_transformers_reads_them(tmp_path: Path, lower: bool):
    from transformers import BertTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "The",
        "un",
        "##able",
        "##s",
        "naive",
        "naïve",
        "字",
        ".",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(f'{{"do_lower_case": {str(lower).lower()}}}')
    ours, theirs = load_tokenizer(tmp_path), BertTokenizerFast.from_pretrained(tmp_path)
    for text in ("The unables.", "the naïve 字 漢", "Naive\n\n  unable"):
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode("The").tolist() == [5 if lower else 6]
    assert ours.name == "wordpiece" and ours.end_of_text == 3
    assert 3 not in ours.encode("the [SEP] the").tolist()
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).name == "wordpiece"


def test_a_foreign_file_cannot_make_tokens_random_short_or_padded(tmp_path: Path):
    engine = Engine.from_str(BPE.engine.to_str())
    engine.model.dropout = 0.9
    engine.enable_truncation(5)
    engine.enable_padding(length=50)
    engine.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(CORPUS[0]), BPE.encode(CORPUS[0]))
    assert torch.equal(loaded.encode("a"), BPE.encode("a"))


def test_broken_vocabularies_are_refused_in_a_sentence(tmp_path: Path):
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"vocab\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"or vocab\.txt"):
        load_tokenizer(tmp_path)


@given(text=st.text(max_size=100), rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.text(max_size=5))
def test_dropout_loses_nothing_and_is_a_function_of_its_seed(text: str, rate: float, seed: str):
    dropout = BPEDropout(BPE, rate)
    ids = dropout.encode(text, seed)
    assert BPE.decode(ids) == text and torch.equal(dropout.encode(text, seed), ids)
    if rate == 0:
        assert torch.equal(ids, BPE.encode(text))
    if rate == 1:
        assert len(ids) == len(text.encode())


def test_dropout_cuts_a_word_as_often_as_tokenizers_own_does():
    """Compare the mean number of tokens per text over many draws."""
    text = CORPUS[0][:32]
    engine = Engine.from_str(BPE.engine.to_str())
    for rate in (0.1, 0.4):
        engine.model.dropout = rate
        dropout = BPEDropout(BPE, rate)
        theirs = torch.tensor([float(len(engine.encode(text).ids)) for _ in range(3000)])
        ours = torch.tensor([float(len(dropout.encode(text, str(i)))) for i in range(3000)])
        error = (ours.var() / 3000 + theirs.var() / 3000).sqrt()
        assert abs(ours.mean() - theirs.mean()) < 5 * error
        assert ours.mean() > len(BPE.encode(text)) + 0.5


def test_dropout_draws_anew_with_each_seed_and_refuses_what_it_cannot():
    dropout = BPEDropout(BPE, 0.5)
    assert len({tuple(dropout.encode(CORPUS[0], str(i)).tolist()) for i in range(10)}) == 10
    long = "x" * 10_000
    assert BPE.decode(dropout.encode(long, "")) == long
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            BPEDropout(BPE, rate)
    with pytest.raises(ValueError, match="needs a byte-level bpe tokenizer, not bytes"):
        BPEDropout(ByteTokenizer(), 0.1)
