"""Word vectors: both formats are read, invalid files are refused in one message, rows are correct."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastgpt.data import load_word_vectors
from fastgpt.data.word_vectors import WordVectors
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer

GLOVE = "the 0.5 -1 2e-1\n, 1 2 3\n. . . 4 5 6\nat name@domain.com 7 8 9\n"
FASTTEXT = "3 2 \nthe 1 2 \n\u00a0 3 4 \nStraße 5 6 \n"


@pytest.fixture
def write(tmp_path: Path):
    def write(content: str | bytes, name: str = "vectors.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_glove(write):
    vectors = load_word_vectors(write(GLOVE))
    assert vectors.words == ["the", ",", ". . .", "at name@domain.com"]
    assert vectors.matrix.dtype == torch.float32
    assert torch.equal(vectors.matrix, torch.tensor([[0.5, -1, 0.2], [1, 2, 3], [4, 5, 6], [7, 8, 9]]))


def test_fasttext(write):
    """Its first line is a header, its lines end in a space, and words may contain other white space."""
    vectors = load_word_vectors(str(write(FASTTEXT)))
    assert vectors.words == ["the", "\u00a0", "Straße"]
    assert vectors.matrix.tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("name", ["vectors.vec.gz", "misnamed.txt"])
def test_gzip(write, name):
    assert load_word_vectors(write(gzip.compress(FASTTEXT.encode()), name)).words[2] == "Straße"


def test_only_the_words_asked_for_are_kept(write):
    vectors = load_word_vectors(write(GLOVE), iter([". . .", "the", "the", "absent", "", "at"]))
    assert vectors.words == ["the", ". . ."]
    assert vectors.matrix.tolist() == [[0.5, -1, pytest.approx(0.2)], [4, 5, 6]]
    nothing = load_word_vectors(write(GLOVE), ["absent"])
    assert nothing.words == [] and nothing.matrix.shape == (0, 3)


def test_the_rest_is_not_read_once_all_are_found(write):
    path = write("the 1 2\nof 3 4\nbroken\n")
    assert load_word_vectors(path, ["of"]).words == ["of"]
    with pytest.raises(ValueError, match="line 3"):
        load_word_vectors(path, ["of", "absent"])


def test_of_a_word_twice_the_first_counts(write):
    vectors = load_word_vectors(write("a 1 2\nb 3 4\na 5 6\n"))
    assert vectors.words == ["a", "b"]
    assert vectors.matrix.tolist() == [[1, 2], [3, 4]]


def test_words_that_are_numbers_and_lines_without_an_end(write):
    vectors = load_word_vectors(write("7 1 2\r\n\n-0.5 3 4\r\n1e5 5 6"))
    assert vectors.words == ["7", "-0.5", "1e5"]
    assert vectors.matrix.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_words_that_are_not_utf8(write):
    vectors = load_word_vectors(write(b"caf\xe9 1 2\ncaf\xe8 3 4\ntea 5 6\n"))
    assert vectors.words == ["caf\ufffd", "tea"]
    assert vectors.matrix.tolist() == [[1, 2], [5, 6]]


@given(
    words=st.lists(
        st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1).filter(
            lambda word: word.strip(" ") == word and "  " not in word
        ),
        min_size=1,
        max_size=20,
        unique=True,
    ),
    width=st.integers(2, 5),
    header=st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory, words, width, header):
    """Use arbitrary words; GloVe's first word is a plain one, as in the published files."""
    words = words if header else ["the", *(word for word in words if word != "the")]
    matrix = torch.randn(len(words), width)
    lines = [f"{len(words)} {width}"] if header else []
    rows = zip(words, matrix.tolist(), strict=True)
    lines += [" ".join([word, *map(repr, row)]) for word, row in rows]
    path = tmp_path_factory.mktemp("vectors") / "some.txt"
    path.write_bytes("\n".join(lines).encode())
    vectors = load_word_vectors(path)
    assert vectors.words == words
    assert torch.equal(vectors.matrix, matrix)
    some = load_word_vectors(path, words[::2])
    assert some.words == words[::2]
    assert torch.equal(some.matrix, matrix[::2])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (
            "just some text\n",
            "line 1: expected a word and its numbers, got 'just some text'; give a text file",
        ),
        ("the\n", "line 1: expected a word and its numbers"),
        ("the 1 2\nof 3\n", "line 2: expected a word and 2 numbers, got 2 fields"),
        ("the 1 2\nof 3 x\n", "line 2: 'x' of 'of' is not a number"),
        ("the 1 2\n\nof 3 nan\n", "line 3: the vector of 'of' contains NaN or infinity"),
        ("the 1 2\nof 3 1e60\n", "line 2: the vector of 'of' contains NaN or infinity"),
        ("the 1 2\n 3 4\n", "line 2: there is no word"),
        ("3 2\nthe 1 2\nof 3 4\n", "has 2 words, and its first line promises 3"),
        (b"PK\x03\x04....", "is a zip archive; unpack it"),
        (b"\xba\x16\x4f\x2f....", "binary model of fastText"),
        (gzip.compress(b"the 1 2\n" * 1000, mtime=0)[:-20], "is damaged or truncated"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(write, content, said):
    with pytest.raises(ValueError, match=said):
        load_word_vectors(write(content))


def test_a_line_of_any_length_is_not_read(write, monkeypatch):
    monkeypatch.setattr("fastgpt.data.word_vectors._LONGEST_LINE", 1000)
    for pack in (bytes, gzip.compress):
        for content in (b"a 1\nb " + b"1 " * 500 + b"\n", b"1" * 1001):
            with pytest.raises(ValueError, match=r"line [12] is longer than 0 MiB"):
                load_word_vectors(write(pack(content)))


def test_bad_arguments_are_refused_in_a_sentence(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_word_vectors(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_word_vectors(tmp_path)
    with pytest.raises(TypeError, match=r"use \['the'\]"):
        load_word_vectors(write(GLOVE), "the")


VECTORS = WordVectors(["the", "of"], torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_go_where_their_words_are_and_the_others_stay(dtype):
    embedding = nn.Embedding(6, 4, dtype=dtype)
    before = embedding.weight.detach().clone()
    report = VECTORS.into(embedding, ["of", "absent", "", "the", "of"])
    assert (report.found, report.missing, report.vocabulary) == (3, 2, 5)
    assert str(report) == "3 of 5 words found (60.0%), 2 missing (rows unchanged)"
    after = embedding.weight
    assert after.dtype == dtype and after.requires_grad
    assert after[[0, 3, 4]].tolist() == VECTORS.matrix[[1, 0, 1]].tolist()
    assert torch.equal(after[[1, 2, 5]], before[[1, 2, 5]])


def test_nothing_found_changes_nothing():
    embedding = nn.Embedding(2, 4)
    before = embedding.weight.detach().clone()
    assert str(VECTORS.into(embedding, [])).startswith("0 of 0 words found (0.0%)")
    assert VECTORS.into(embedding, ["a", "b"]).missing == 2
    assert torch.equal(embedding.weight, before)


def test_bad_targets_are_refused_in_a_sentence_and_left_alone():
    embedding = nn.Embedding(2, 3)
    with pytest.raises(ValueError, match="4 dimensions and the embedding has 3"):
        VECTORS.into(embedding, ["the"])
    with pytest.raises(ValueError, match="3 words and the embedding 2 rows"):
        VECTORS.into(nn.Embedding(2, 4), ["the", "of", "and"])
    with pytest.raises(TypeError, match="one string"):
        VECTORS.into(nn.Embedding(2, 4), "of")
    with pytest.raises(TypeError, match="cannot find the token embedding of a Linear"):
        VECTORS.into(nn.Linear(4, 4), ["the"])
    with pytest.raises(ValueError, match="meta device"):
        VECTORS.into(nn.Embedding(2, 4, device="meta"), ["the"])


CORPUS = ["the cat saw the other cat and the dog\n" * 50, "für Straße 漢字 🎉\n" * 50]


def test_words_of_byte_level_bpe():
    tokenizer = BPETokenizer.train(CORPUS, 300)
    words = tokenizer.words()
    assert len(words) == tokenizer.vocab_size
    (the,) = tokenizer.encode(" the").tolist()
    assert words[the] == "the"  # "Ġthe" in the file
    assert words[tokenizer.encode("a").tolist()[0]] == "a"
    for token, word in enumerate(words):
        text = tokenizer.decode(torch.tensor([token]))
        assert word == ("" if "\ufffd" in text or token == tokenizer.end_of_text else text.strip())
    assert "" in words and not any(word != word.strip() or "Ġ" in word or "\ufffd" in word for word in words)


def test_words_of_bytes():
    words = ByteTokenizer().words()
    assert len(words) == 256
    assert words[ord("a")] == "a" and words[ord("~")] == "~"
    assert not any(words[byte] for byte in (*b" \n\t\0\x7f", *range(128, 256)))


def test_vectors_into_a_gpt_by_its_tokenizer(write):
    """The rows belong to the tokens, also in the tied output projection."""
    tokenizer = BPETokenizer.train(CORPUS, 300)
    model = GPT(GPTConfig(vocab_size=304, block_size=8, n_layer=1, n_head=2, n_embd=4))
    before = model.wte.weight.detach().clone()
    path = write("the 1 2 3 4\nzebra 0 0 0 0\ncat 5 6 7 8\n")
    report = load_word_vectors(path, tokenizer.words()).into(model, tokenizer.words())
    changed = (model.wte.weight != before).any(1).nonzero().flatten().tolist()
    assert len(changed) == report.found >= 2 and report.vocabulary == tokenizer.vocab_size
    assert {tokenizer.words()[token] for token in changed} == {"the", "cat"}
    assert model.wte.weight[tokenizer.encode(" the")[0]].tolist() == [1, 2, 3, 4]
    assert model.lm_head.weight is model.wte.weight
    _, loss = model(torch.randint(0, 304, (1, 8)), torch.randint(0, 304, (1, 8)))
    loss.backward()
    assert model.wte.weight.grad.isfinite().all()


def test_vectors_into_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=5, n_positions=8, n_layer=1, n_head=2, n_embd=4)
    model = transformers.GPT2LMHeadModel(config)
    assert VECTORS.into(model, ["a", "the"]).found == 1
    assert model.transformer.wte.weight[1].tolist() == [1, 2, 3, 4]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_byte_order_mark_is_no_part_of_the_first_word(write):
    assert load_word_vectors(write("\ufeff" + GLOVE), ["the"]).words == ["the"]
    assert load_word_vectors(write("\ufeff" + FASTTEXT)).words[0] == "the"


def test_spaces_before_the_numbers_are_no_part_of_the_word(write):
    vectors = load_word_vectors(write("a  1 2\nb 3 4\n. .   5 6\n"))
    assert vectors.words == ["a", "b", ". ."]
    assert vectors.matrix.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_underscore_makes_no_number(write):
    with pytest.raises(ValueError, match="line 2: '1_0' of 'b' is not a number"):
        load_word_vectors(write("a 1 2\nb 1_0 2\n"))
    assert load_word_vectors(write("a 1_0 2\n")).words == ["a 1_0"]
