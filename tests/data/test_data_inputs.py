"""Inputs: directories report skipped files; pipes and standard input are accepted wherever files are."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt.cli import main
from fastgpt.data import PrepareConfig, load_corpus, load_documents, open_dataset, prepare, read_source
from fastgpt.evaluation.tasks.examples import read_examples
from fastgpt.training.config import TrainConfig
from fastgpt.training.datasets import check_source
from tests.data.test_data_formats import CONTENTS, PACKERS, TEXTS, lines, prepared


def untidy(root: Path) -> None:
    """Make a directory with every kind of entry."""
    (root / "sub").mkdir(parents=True)
    (root / "outside").mkdir()
    for i in range(12):
        (root / "sub" / f"{i}.txt").write_text(f"text {i}\n" * 20)
    (root / "outside" / "secret.txt").write_text("secret " * 20)
    data = root / "sub"
    (data / "link").symlink_to("../outside")
    (data / "link.txt").symlink_to("../outside/secret.txt")
    (data / "broken.txt").symlink_to("nowhere")
    (data / ".git").mkdir()
    (data / ".git" / "config").write_text("secret")
    (data / ".hidden").write_text("secret")
    (data / "empty.txt").touch()
    (data / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (data / "picture.png").write_bytes(b"\x89PNG\0")
    (data / "package.json").write_text('{"name": "secret"}')
    (data / "numbers.csv").write_text("a,b\n1,2\n")
    (data / "lines.jsonl").write_text('{"text": "of JSON"}\n')
    (data / "packed.txt.gz").write_bytes(gzip.compress(b"packed"))
    os.mkfifo(data / "pipe")


LEFT_OUT = {
    **{"link": "linked directory", "link.txt": "link", "broken.txt": "link", ".git": "hidden directory"},
    **{
        ".hidden": "hidden file",
        "empty.txt": "empty",
        "latin.txt": "not UTF-8 text",
        "picture.png": "not UTF-8 text",
    },
    **{
        "package.json": "there is no text under 'text'",
        "numbers.csv": "there is no text",
        "pipe": "not a regular file",
    },
}


def check_left_out(entries: list[str], data: Path) -> None:
    assert len(entries) == len(LEFT_OUT)
    for name, reason in LEFT_OUT.items():
        (entry,) = (entry for entry in entries if entry.startswith(f"{data / name}: "))
        assert reason in entry


def test_a_directory_reports_each_file_it_leaves_out(tmp_path: Path, capfd: pytest.CaptureFixture):
    untidy(tmp_path)
    data = tmp_path / "sub"
    corpus = load_corpus(str(data))
    texts = sorted([*(f"text {i}\n" * 20 for i in range(12)), "of JSON", "packed"])
    assert sorted(corpus.train + corpus.val) == texts
    check_left_out(corpus.left_out, data)
    assert sorted(prepared([str(data)], tmp_path / "out")) == texts
    check_left_out(open_dataset(tmp_path / "out").facts["report"]["left_out"], data)
    tiny = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--max-steps=1", "--sample-tokens=0"]
    assert main(["train", f"--data={data}", f"--out={tmp_path / 'run'}", *tiny]) == 0
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("data: left out ")]
    check_left_out([line.removeprefix("data: left out ") for line in printed], data)
    assert main(["eval", "--checkpoint", str(tmp_path / "run"), "--data", str(data)]) == 0
    printed = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("fastgpt: note: left out ")
    ]
    check_left_out([line.removeprefix("fastgpt: note: left out ") for line in printed], data)
    assert (
        main(["data", str(data), f"--out={tmp_path / 'again'}", "--tokenizer=bytes", "--repetition=keep"])
        == 0
    )
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("left out ")]
    check_left_out([line.removeprefix("left out ") for line in printed], data)


def test_links_are_followed_where_they_are_named_and_nowhere_else(tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.txt").write_text("outside " * 20)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "b.txt").write_text("inside " * 20)
    for name, target in (
        ("c.txt", "b.txt"),
        ("d.txt", "../outside/a.txt"),
        ("e.txt", "/dev/zero"),
        ("f", ".."),
    ):
        (tmp_path / "corpus" / name).symlink_to(target)
    for name, target in (("named.txt", "outside/a.txt"), ("named", "corpus")):
        (tmp_path / name).symlink_to(target)
    inside, outside = "inside " * 20, "outside " * 20
    for source, texts, left_out in (
        ("corpus", [inside], 4),
        ("named", [inside], 4),
        ("named.txt", [outside], 0),
    ):
        loaded = read_source(str(tmp_path / source))
        assert loaded.texts == texts and len(loaded.left_out) == left_out
        out = tmp_path / f"{source}-set"
        assert prepared([str(tmp_path / source)], out) == texts
        assert len(open_dataset(out).facts["report"]["left_out"]) == left_out


def test_many_files_that_are_left_out_are_counted(tmp_path: Path):
    for i in range(150):
        (tmp_path / f"{i}.png").write_bytes(b"\0")
    (tmp_path / "a.txt").write_text("text " * 50)
    report = prepare([str(tmp_path)], PrepareConfig(f"{tmp_path}-out", tokenizer="bytes", repetition="keep"))
    assert len(report.left_out) == 150
    assert report.table().count("left out ") == 101 and "left out 50 more" in report.table()


@pytest.mark.parametrize("name", ["jsonl", "json", "text"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_pipe_is_read_once(tmp_path: Path, name: str, packed: str):
    content = "".join(TEXTS).encode() if name == "text" else CONTENTS[name]()
    expected = ["".join(TEXTS)] if name == "text" else TEXTS
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def feed() -> None:
        with pipe.open("wb", buffering=0) as stream:
            for byte in (packed_content[:1], packed_content[1:3], packed_content[3:]):
                stream.write(byte)

    packed_content = PACKERS[packed](content)
    for read in (lambda: load_documents(str(pipe)), lambda: prepared([str(pipe)], tmp_path / "out")):
        writer = threading.Thread(target=feed)
        writer.start()
        assert read() == expected
        writer.join()
    with pytest.raises(
        ValueError, match=r"pipe can be read only once, and --tokenizer bpe reads the text twice"
    ):
        prepare([str(pipe)], PrepareConfig(str(tmp_path / "bpe")))
    with pytest.raises(ValueError, match="can be read by one process"):
        check_source(TrainConfig(data=str(pipe)), 2)


@pytest.fixture
def feed_stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def feed(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return feed


def test_standard_input_is_read_wherever_a_text_is(
    tmp_path: Path, feed_stdin: Callable[[bytes], None], capsys: pytest.CaptureFixture
):
    mark, text = b"\xef\xbb\xbf", "".join(f"line {i} of text\n" for i in range(99)).encode()
    feed_stdin(mark + text)
    tiny = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--max-steps=1", "--sample-tokens=0"]
    assert main(["train", "--data=-", f"--out={tmp_path / 'run'}", *tiny]) == 0
    assert "data: standard input, one stream" in capsys.readouterr().out
    feed_stdin(text)
    assert main(["eval", "--checkpoint", str(tmp_path / "run"), "--data", "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == len(text) - 1
    feed_stdin(mark + b"hello\nworld\n")
    arguments = ["--max-new-tokens", "1", "--json"]
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), "--prompts", "-", *arguments]) == 0
    prompts = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert prompts == ["hello", "world"]
    feed_stdin(mark + b'{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}\n')
    assert [example.output for example in read_examples("-")[0]] == ["b", "d"]
    feed_stdin(lines())
    assert prepared(["-"], tmp_path / "out") == TEXTS
    feed_stdin(b"")
    assert main(["train", "--data=-", f"--out={tmp_path / 'empty'}", *tiny]) == 2
    assert capsys.readouterr().err == "fastgpt: error: standard input is empty\n"


@pytest.mark.parametrize("closed", [None, io.TextIOWrapper(io.BytesIO())])
def test_standard_input_that_is_closed(closed: io.TextIOWrapper | None, monkeypatch: pytest.MonkeyPatch):
    if closed is not None:
        closed.close()
    monkeypatch.setattr(sys, "stdin", closed)
    with pytest.raises(OSError, match="standard input is closed"):
        load_documents("-")
