"""Corpora: reading, held-out parts, invalid inputs, and the batch of a step."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastgpt import data
from fastgpt.data.batches import Batch


def test_stdlib_is_python_source_without_tests_the_same_each_time():
    corpus = data.load_corpus("stdlib")
    train, val = "".join(corpus.train), "".join(corpus.val)
    assert 5e6 < len(train) < 3e7
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.10
    assert train.count("import ") > 1000 and val.count("def ") > 100
    assert "class TestCase(" in train + val  # a module of the library, whose own tests are excluded
    assert not any("idlelib" in text[:200] for text in corpus.train)
    assert data.load_corpus("stdlib") == corpus


def test_stdlib_holds_out_text_like_its_training_text():
    corpus = data.load_corpus("stdlib")
    train, val = (torch.tensor(list("".join(part).encode()[:600_000])) for part in (corpus.train, corpus.val))
    assert abs(data.unigram_entropy(train) - data.unigram_entropy(val)) < 0.15


def test_the_last_tenth_of_a_file_is_held_out(tmp_path: Path):
    file = tmp_path / "text.txt"
    text = "".join(chr(97 + i % 26) for i in range(1000)) + "\r\n"
    file.write_bytes(text.encode())
    corpus = data.load_corpus(str(file))
    assert "".join(corpus.train + corpus.val) == text
    assert len(corpus.val[0]) == 100


def test_whole_files_of_a_directory_are_held_out(tmp_path: Path):
    for i in range(40):
        (tmp_path / f"{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 3}" / f"{i}.txt").write_text(f"<{i}>" * 50)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / ".hidden").write_text("hidden")
    corpus = data.load_corpus(str(tmp_path))
    assert 2 <= len(corpus.val) <= 4
    assert sorted(corpus.train + corpus.val) == sorted(f"<{i}>" * 50 for i in range(40))


def test_few_files_each_give_their_end(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 100)
    corpus = data.load_corpus(str(tmp_path))
    assert sorted(corpus.train) == [f"{i}" * 90 for i in range(3)]
    assert sorted(corpus.val) == [f"{i}" * 10 for i in range(3)]


def test_what_is_no_text_is_refused_in_a_sentence(tmp_path: Path):
    empty, binary, latin, folder = (tmp_path / name for name in ("empty", "binary", "latin", "folder"))
    empty.touch()
    binary.write_bytes(b"abc\0def")
    latin.write_bytes("Käse".encode("latin-1"))
    folder.mkdir()
    for path, kind, message in [
        (tmp_path / "absent", FileNotFoundError, "file or directory .* does not exist"),
        (empty, ValueError, "is empty"),
        (binary, ValueError, "not UTF-8 text"),
        (latin, ValueError, "not UTF-8 text"),
        (folder, ValueError, "contains no text files"),
    ]:
        with pytest.raises(kind, match=message):
            data.load_corpus(str(path))


def test_a_batch_is_a_pure_function_of_seed_and_step():
    tokens = torch.arange(1000, dtype=torch.int32)
    options = {"batch_size": 4, "block_size": 16}
    x, y = data.batch(tokens, 7, seed=1, **options)
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    torch.manual_seed(5)
    assert torch.equal(data.batch(tokens, 7, seed=1, **options)[0], x)
    assert not torch.equal(data.batch(tokens, 8, seed=1, **options)[0], x)
    assert not torch.equal(data.batch(tokens, 7, seed=2, **options)[0], x)


def test_batches_reach_every_window_and_no_further():
    tokens = torch.arange(20)
    starts = torch.cat(
        [data.batch(tokens, s, batch_size=8, block_size=16, seed=0)[0][:, 0] for s in range(40)]
    )
    assert starts.unique().tolist() == [0, 1, 2, 3]


def test_even_batches_span_the_text():
    batches = data.Stream(torch.arange(1000), batch_size=4, block_size=10).validation_batches(3)
    starts = torch.cat([batch.idx[:, 0] for batch in batches])
    assert len(starts) == 12 and starts[0] == 0 and starts[-1] == 989
    gaps = starts.diff()
    assert gaps.max() - gaps.min() <= 1
    assert (
        data.Stream(torch.arange(11), batch_size=1, block_size=10).validation_batches(2)[1].targets[0, -1]
        == 10
    )


def test_unigram_entropy_of_known_distributions():
    assert data.unigram_entropy(torch.arange(256, dtype=torch.uint8)) == pytest.approx(math.log(256))
    assert data.unigram_entropy(torch.full((9,), 3)) == pytest.approx(0)
    assert data.unigram_entropy(torch.tensor([0, 0, 0, 5])) == pytest.approx(math.log(4) - 0.75 * math.log(3))


def test_a_batch_goes_to_a_gpu_without_the_host_waiting():
    batch = Batch(*(torch.arange(6).view(2, 3) for _ in range(2)), cu_seqlens=torch.tensor([0, 6]))
    pinned, copied = [], []

    def pin(x):
        pinned.append(x.data_ptr())
        return x

    def to(x, device, non_blocking=False):
        copied.append((x.data_ptr(), device.type, non_blocking))
        return x

    with mock.patch.object(torch.Tensor, "pin_memory", pin), mock.patch.object(torch.Tensor, "to", to):
        batch.to(torch.device("cuda"))
        assert copied == [(address, "cuda", True) for address in pinned]
        assert len(pinned) == 3
        batch.to(torch.device("cpu"))
        assert len(pinned) == 3
