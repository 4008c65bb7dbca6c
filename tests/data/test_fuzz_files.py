"""Fuzzing of all file formats: a result or one message, no other exception, no hang, bounded memory."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt import tokenizer
from fastgpt.atomic_io import fingerprint
from fastgpt.data import DatasetWriter, load_documents, load_word_vectors, open_dataset, pack, unigram_entropy
from fastgpt.data.cleaning import Rules, clean
from fastgpt.data.report import Report
from fastgpt.data.sources import Sources
from fastgpt.evaluation.tasks.examples import read_examples
from fastgpt.evaluation.tasks.template import parse_template
from fastgpt.tokenizer import BPETokenizer, load_tokenizer
from fastgpt.training.config import TrainConfig, read_toml
from tests.data.test_data_formats import CONTENTS, PACKERS
from tests.model.test_tokenizer_json import bert, gpt2, llama2, llama3, t5
from tests.support.fuzz import Case, Files, cases, check

FEW, MANY = 40, 1000  # cases per format, in the fast and the slow tier
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
TEXT = "".join(f"line {i} of naïve 漢字 text 😀\n" for i in range(40))

pytestmark = [
    pytest.mark.parametrize("count", COUNTS),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_outside_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Check that the working directory and files beside the inputs are unchanged."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("years")
    monkeypatch.chdir(outside)
    yield
    assert sorted(os.listdir(tmp_path)) in (["files", "outside"], ["outside"])
    assert os.listdir(outside) == ["precious.txt"] and (outside / "precious.txt").read_text() == "years"


def fuzz(
    valid: Files, count: int, directory: Path, read: Callable[[Path, Case], object], **options: Files
) -> None:
    """Read the valid files and many damaged ones."""
    Case(valid, []).write(directory)
    assert read(directory, Case(valid, [])) is not None
    results = 0
    for case in cases(valid, count, **options):
        case.write(directory)
        results += check(lambda case=case: read(directory, case), case) is not None
    if count >= MANY:
        assert results < count, "no damage was seen"


# ---- texts and records ----


def text_files() -> dict[str, bytes]:
    return {
        "a.txt": TEXT.encode(),
        **{f"a.{name}": CONTENTS[name]() for name in ("jsonl", "json", "csv", "tsv")},
    }


def read_texts(file: Path) -> list[str]:
    """Read like `train --data` and like `fastgpt data`."""
    texts = load_documents(str(file))
    assert all(text and "\0" not in text for text in texts)
    for text, _ in Sources([str(file)], "text", "<|endoftext|>", True, Report("")).documents():
        clean(text, Rules())
    return texts


@pytest.mark.parametrize("name", text_files())
def test_texts_and_records(tmp_path: Path, name: str, count: int):
    fuzz({name: text_files()[name]}, count, tmp_path / "files", lambda path, _: read_texts(path / name))


@pytest.mark.parametrize("packed", [*PACKERS][1:])
def test_compressed_texts(tmp_path: Path, packed: str, count: int):
    """Damage files before and after compression."""
    for name, content in {"a.txt": TEXT.encode(), "a.jsonl": CONTENTS["jsonl"]()}.items():
        valid = {name + packed: PACKERS[packed](content)}
        fuzz(
            valid,
            count // 2,
            tmp_path / "files",
            lambda path, _, name=name: read_texts(path / (name + packed)),
        )


def test_parquet(tmp_path: Path, count: int):
    fuzz(
        {"a.parquet": CONTENTS["parquet"]()},
        count,
        tmp_path / "files",
        lambda path, _: read_texts(path / "a.parquet"),
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_examples_of_a_task(tmp_path: Path, name: str, count: int):
    pairs = [{"input": f"question {i}", "output": f"answer {i}"} for i in range(9)]
    table = "input,output\n" + "".join(f'"{pair["input"]}",{pair["output"]}\n' for pair in pairs)
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    content = {"a.jsonl": lines, "a.json": json.dumps(pairs), "a.csv": table}[name]
    fuzz({name: content.encode()}, count, tmp_path / "files", lambda path, _: read_examples(path / name))


# ---- prepared data sets ----


def data_set(directory: Path) -> Files:
    with DatasetWriter(directory / "made", BPETokenizer(gpt2().to_str()), shard_tokens=60) as writer:
        for i in range(12):
            writer.add("val" if i % 5 == 0 else "train", np.arange(1, 20 + i))
        writer.finish({})
    files = {file.name: file.read_bytes() for file in sorted((directory / "made").iterdir())}
    for file in (directory / "made").iterdir():
        file.unlink()
    (directory / "made").rmdir()
    return files


def listed(path: Path, case: Case) -> Case:
    """Update sizes and checksums in dataset.json, so that they do not detect the damage."""
    try:
        facts = json.loads((path / "dataset.json").read_bytes())
        for name in facts["files"]:
            facts["files"][name] = fingerprint(path / name)
        (path / "dataset.json").write_text(json.dumps(facts))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return case


@pytest.mark.parametrize("with_checksums", [True, False])
def test_data_sets(tmp_path: Path, with_checksums: bool, count: int):
    valid = data_set(tmp_path)

    def read(path: Path, case: Case) -> object:
        if not with_checksums:
            listed(path, case)
        dataset = open_dataset(path)
        same = all(
            case.files.get(name) == content for name, content in valid.items() if name != "dataset.json"
        )
        assert same or not with_checksums
        size = dataset.tokenizer().vocab_size
        for name in ("train", "val"):
            split = dataset.split(name)
            tokens = split[0 : len(split)]
            assert len(split) and 0 <= int(tokens.min()) <= int(tokens.max()) < size
            assert len(pack(split.document_ends, 8)) and unigram_entropy(tokens) >= 0
            dataset.tokenizer().decode(tokens)
        return dataset

    fuzz(valid, 3 * count, tmp_path / "files", read)


# ---- tokenizers ----


def use(path: Path) -> object:
    """Load a tokenizer and use it."""
    loaded = load_tokenizer(path)
    ids = loaded.encode(TEXT)
    assert 0 <= int(ids.min()) <= int(ids.max()) < loaded.vocab_size if len(ids) else True
    assert isinstance(loaded.decode(ids), str)
    loaded.decode(torch.arange(-1, min(loaded.vocab_size + 1, 1000)))
    assert len(loaded.words()) == loaded.vocab_size
    assert loaded.end_of_text is None or 0 <= loaded.end_of_text < loaded.vocab_size
    again = type(loaded)(loaded.serialized()) if isinstance(loaded, BPETokenizer) else loaded
    assert again.encode(TEXT).tolist() == ids.tolist()
    return loaded


@pytest.mark.parametrize("make", [gpt2, bert, llama2, llama3, t5])
def test_tokenizer_json(tmp_path: Path, make: Callable, count: int, capfd: pytest.CaptureFixture):
    valid = {"tokenizer.json": json.dumps(json.loads(make().to_str())).encode()}
    others = {str(other): other().to_str().encode() for other in (gpt2, bert, t5)}
    fuzz(valid, count, tmp_path / "files", lambda path, _: use(path), others=others)
    assert "panicked" not in capfd.readouterr().err


def test_vocabularies_of_gpt2_and_bert(tmp_path: Path, count: int, capfd: pytest.CaptureFixture):
    made = gpt2()
    vocabulary = json.loads(made.to_str())["model"]
    merges = "#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in vocabulary["merges"])
    valid = {"vocab.json": json.dumps(vocabulary["vocab"]).encode(), "merges.txt": merges.encode()}
    fuzz(valid, count, tmp_path / "files", lambda path, _: use(path))
    words = "\n".join(json.loads(bert().to_str())["model"]["vocab"])
    settings = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    valid = {"vocab.txt": words.encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    fuzz(valid, count, tmp_path / "files", lambda path, _: use(path))
    assert "panicked" not in capfd.readouterr().err


# ---- the rest ----


@pytest.mark.parametrize("pack_up", [bytes, gzip.compress])
@pytest.mark.parametrize("header", [b"", b"30 4\n"])
def test_word_vectors(tmp_path: Path, pack_up: Callable[[bytes], bytes], header: bytes, count: int):
    lines = "".join(f"word{i} {i / 7:.3f} -1 {i}e-2 0.5\n" for i in range(30)).encode()

    def read(path: Path, _: Case) -> object:
        for words in (None, ["word3", "word9"]):
            vectors = load_word_vectors(path / "v.vec", words)
            assert vectors.matrix.shape[0] == len(vectors.words) and vectors.matrix.isfinite().all()
        return vectors

    fuzz({"v.vec": pack_up(header + lines)}, count, tmp_path / "files", read)


def test_toml(tmp_path: Path, count: int):
    options = (
        'data = "stdlib"\nmax_steps = 3\nlr = 1e-3\nbias = false\n# note\npatience = 3\nactivation = "gelu"\n'
    )

    def read(path: Path, _: Case) -> object:
        return TrainConfig().override(read_toml(path / "c.toml")).as_dict()

    fuzz({"c.toml": options.encode()}, 2 * count, tmp_path / "files", read)
    template = (
        Path(tokenizer.__file__).parent / "evaluation" / "tasks" / "templates" / "answer.toml"
    ).read_bytes()

    def parse(path: Path, _: Case) -> object:
        return parse_template("answer", (path / "answer.toml").read_text("utf-8"))

    fuzz({"answer.toml": template}, count, tmp_path / "files", parse)
