"""`fastgpt data` end to end: planted problems are found, other documents are written, failures leave no files."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.cli import main
from fastgpt.data import DatasetError, PrepareConfig, TokenDataset, open_dataset, prepare
from fastgpt.data import sources as sources_module
from fastgpt.tokenizer import BPETokenizer, load_tokenizer

RANDOM = random.Random(3)
VOCABULARY = [
    "".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyz", k=RANDOM.randrange(2, 9))) for _ in range(3000)
]


def prose(words: int) -> str:
    return " ".join(RANDOM.choices(VOCABULARY, k=words)) + "."


DOCUMENTS = [prose(RANDOM.randrange(60, 300)) for _ in range(120)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents(dataset: TokenDataset, split: str) -> list[str]:
    """Decode the documents of a split."""
    tokens, tokenizer = dataset.split(split), dataset.tokenizer()
    ends = tokens.document_ends.tolist()
    assert all(tokens[end - 1 : end].item() == tokenizer.end_of_text for end in ends)
    return [tokenizer.decode(tokens[start : end - 1]) for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_everything_planted_is_found_and_nothing_else_is_dropped(tmp_path: Path, tokenizer: str):
    near = [text.replace(" ", "  ", 5) + " " + VOCABULARY[i] for i, text in enumerate(DOCUMENTS[:10])]
    marked = [
        f"<p class='x'>{a}</p> <b>{b}</b> &amp; more<br>"
        for a, b in zip(DOCUMENTS[:9], VOCABULARY, strict=False)
    ]
    marked = [prose(80) + text for text in marked]
    control = [f"\ufeff{prose(50)}\0\x07\r\n{prose(50)}\x1b[31m" for _ in range(8)]
    clean = [*DOCUMENTS, *(prose(70) + f"\nList<int> a < b && c; #include <x{i}> R&D" for i in range(6))]
    planted = [*near, *marked, *control, *DOCUMENTS[20:27], " \n", "\0", "la " * 60]
    texts = [*clean, *planted]
    report = prepare(
        [str(write_jsonl(tmp_path / "in.jsonl", texts))],
        PrepareConfig(
            str(tmp_path / "out"), tokenizer=tokenizer, vocab_size=600, near_duplicates=0.8, val_share=0.1
        ),
    )
    assert report.dropped == {"near duplicate": 10, "exact duplicate": 7, "empty": 2, "repeated phrases": 1}
    assert report.changed == {"markup": 9, "control": 8}
    assert report.read == len(texts) and report.kept == len(clean) + 17
    assert report.examples["repeated phrases"].startswith("'la la la")
    dataset = open_dataset(tmp_path / "out")
    written = documents(dataset, "train") + documents(dataset, "val")
    assert set(clean) <= set(written) and len(written) == report.kept == sum(report.documents.values())
    for text in set(written) - set(clean):
        assert not any(
            remnant in text for remnant in ("<p", "</", "<b", "&amp;", "\0", "\x07", "\r", "\x1b", "\ufeff")
        )
    assert dataset.facts["report"]["dropped"] == report.dropped
    assert report.tokens == {split: len(dataset.split(split)) for split in ("train", "val")}


def test_what_is_held_out_depends_on_the_text_alone(tmp_path: Path):
    shuffled = random.Random(1).sample(DOCUMENTS, len(DOCUMENTS))
    held_out = []
    for i, texts in enumerate((DOCUMENTS, shuffled, DOCUMENTS[:60])):
        source = write_jsonl(tmp_path / f"{i}.jsonl", texts)
        prepare([str(source)], PrepareConfig(str(tmp_path / str(i)), tokenizer="bytes", val_share=0.2))
        held_out.append(set(documents(open_dataset(tmp_path / str(i)), "val")))
    assert held_out[0] == held_out[1] and 10 < len(held_out[0]) < 40
    assert held_out[2] == held_out[0] & set(DOCUMENTS[:60])


@given(st.integers(1, 8), st.randoms(use_true_random=False))
def test_something_is_held_out_of_the_smallest_corpus(count: int, draw: random.Random):
    from fastgpt.data.duplicates import digest
    from fastgpt.data.prepare import _Document, _split

    texts = draw.sample(DOCUMENTS, count)
    parted = list(_split((_Document(text, digest(text)) for text in texts), 1e-12))
    held_out = [document.text for split, document in parted if split == "val"]
    assert len(held_out) == 1
    assert sorted("".join(document.text for _, document in parted)) == sorted("".join(texts))
    if count == 1:
        assert len(held_out[0]) == len(texts[0]) // 10
    else:
        assert held_out == [min(texts, key=digest)]
        assert sorted(document.text for _, document in parted) == sorted(texts)


def test_a_share_of_zero_holds_out_nothing(tmp_path: Path):
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    report = prepare([str(source)], PrepareConfig(str(tmp_path / "out"), tokenizer="bytes", val_share=0))
    assert report.documents == {"train": len(DOCUMENTS)}
    with pytest.raises(DatasetError, match="is empty"):
        open_dataset(tmp_path / "out").split("val")


def test_preparing_twice_gives_the_same_files(tmp_path: Path):
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    for name in "ab":
        config = PrepareConfig(str(tmp_path / name), vocab_size=400, bpe_dropout=0.1, shard_tokens=3000)
        prepare([str(source)], config)
    a, b = (open_dataset(tmp_path / name).facts for name in "ab")
    assert a["files"] == b["files"] and len(a["files"]) > 6


def test_inputs_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.txt").write_text("in a folder\n<|endoftext|>\nall one document")
    (folder / "b.py").write_text("x = 1\n")
    (folder / "c.jsonl").write_text('{"text": "in a folder, of JSON"}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "empty").touch()
    (folder / ".hidden").write_text("hidden")
    (tmp_path / "many.txt").write_bytes(
        b"one\r\nmore\r\n<|endoftext|>\r\ntwo\n<|endoftext|>\n<|endoftext|>\nthree<|endoftext|>"
    )
    (tmp_path / "lines.jsonl").write_text(
        '{"text": "from JSON \\u00e9"}\n\n  \n{"text": "\\ud800 lone", "id": 1}'
    )

    def load_dataset(name: str, *, split: str, revision: str | None, streaming: bool) -> list[dict[str, str]]:
        assert streaming
        return [{"text": f"{name} {revision or ''}{split} {i}"} for i in range(2)]

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    inputs = [str(tmp_path / name) for name in ("folder", "many.txt", "lines.jsonl")]
    report = prepare(
        [*inputs, "hf:org/name", "hf:other:test", "hf:other@v1.0", "hf:other@v1.0:test"],
        PrepareConfig(str(tmp_path / "out"), tokenizer="bytes", val_share=0.3),
    )
    dataset = open_dataset(tmp_path / "out")
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(
        [
            *("in a folder\n<|endoftext|>\nall one document", "x = 1\n", "in a folder, of JSON"),
            *("one\nmore\n", "two\n", "three<|endoftext|>", "from JSON é", " lone"),
            *("org/name train 0", "org/name train 1", "other test 0", "other test 1"),
            *(f"other v1.0{split} {i}" for split in ("train", "test") for i in range(2)),
        ]
    )
    assert report.skipped == {"no text": 2} and report.read == 16


def test_a_local_hugging_face_data_set(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", DOCUMENTS[:12])
    report = prepare([f"hf:{folder}"], PrepareConfig(str(tmp_path / "out"), tokenizer="bytes"))
    assert report.kept == 12


def test_a_long_text_file_is_cut_behind_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources_module, "LONGEST", 4000)
    text = "\n".join(DOCUMENTS) + "\n" + "".join(map(str, range(2500)))
    (tmp_path / "long.txt").write_text(text)
    prepare(
        [str(tmp_path / "long.txt")], PrepareConfig(str(tmp_path / "out"), tokenizer="bytes", val_share=0)
    )
    parts = documents(open_dataset(tmp_path / "out"), "train")
    assert "".join(parts) == text and max(map(len, parts)) < 6000
    assert all(part.endswith("\n") for part in parts if not part[-99:].isdigit())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.txt", b" \n\n", r"no document is left of 1 read \(1 empty\)"),
        ("blank.jsonl", b"\n \n", "no document is left of 0 read"),
        ("nul.txt", b"text\n\0\n", "nul.txt is not UTF-8 text"),
        ("latin.txt", b"text\nK\xe4se", "latin.txt is not UTF-8 text"),
        (
            "broken.jsonl",
            b'{"text": "a"}\n{"text": "b"\n',
            r"broken.jsonl, line 2: not JSON .*; give --skip-broken",
        ),
        ("latin.jsonl", b'{"text": "a"}\n\n{"text": "K\xe4se"}\n', "line 3: not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("field.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: there is no text under 'text'"),
        ("type.jsonl", b'{"text": 5}\n', "line 1: there is no text"),
        ("list.jsonl", b'["text"]\n', "line 1: there is no text"),
        ("absent.txt", None, "absent.txt does not exist"),
        ("hollow", "directory", "contains no files"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bad_input_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, name: str, content: bytes | str | None, message: str, tokenizer: str
):
    source = tmp_path / name
    if content == "directory":
        source.mkdir()
    elif isinstance(content, bytes):
        source.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message) as error:
        prepare([str(source)], PrepareConfig(str(tmp_path / "out"), tokenizer=tokenizer))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_broken_lines_are_skipped_on_request_and_counted(tmp_path: Path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "first"}\n{"text": \n{"body": 1}\n\xff\n{"text": "last"}\n')
    config = PrepareConfig(str(tmp_path / "out"), tokenizer="bpe", vocab_size=300, skip_broken=True)
    report = prepare([str(source)], config)
    assert report.skipped == {"broken line": 3} and report.kept == 2
    assert "line 2: not JSON" in report.examples["broken line"] and "broken line" in report.table()


def test_options_that_make_no_data_set_are_refused():
    for wrong in (
        *({"val_share": 1.0}, {"val_share": -0.1}, {"bpe_dropout": 1.5}, {"near_duplicates": 0.0}),
        *(
            {"shard_tokens": 0},
            {"separator": "a\nb"},
            {"markup": "maybe"},
            {"max_chars": 0},
        ),
        {"val_share": float("nan")},
    ):
        with pytest.raises(ValueError, match="must"):
            PrepareConfig(**wrong)


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = str(write_jsonl(tmp_path / "in.jsonl", [*DOCUMENTS, DOCUMENTS[0], "a\x1b\x00\n<b>b</b>" * 20]))
    out = str(tmp_path / "out")
    assert main(["data", source, "--out", out, "--tokenizer", "bytes", "--min-chars", "50"]) == 0
    table = capsys.readouterr().out
    assert "dropped: exact duplicate" in table and "changed: control" in table and "MB/s" in table
    assert main(["data", source, "--out", out]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main(["data", source, "--out", out, "--overwrite", "--vocab-size", "400", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["read"] == 122 and report["vocab_size"] == 400 and report["bytes"] > 0 < report["seconds"]


def test_dropout_is_in_the_training_split_alone(tmp_path: Path):
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    lengths = []
    for rate in (0.0, 0.5):
        out = tmp_path / str(rate)
        prepare([str(source)], PrepareConfig(str(out), vocab_size=600, bpe_dropout=rate, val_share=0.2))
        dataset = open_dataset(out)
        assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(DOCUMENTS)
        lengths.append((len(dataset.split("train")), len(dataset.split("val"))))
        saved = json.loads((out / "tokenizer.json").read_text())
        assert saved["model"]["dropout"] is None and isinstance(load_tokenizer(out), BPETokenizer)
    assert lengths[1][0] > 1.2 * lengths[0][0] and lengths[1][1] == lengths[0][1]


def test_dropout_needs_bpe(tmp_path: Path):
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match="needs a byte-level bpe tokenizer, not bytes"):
        prepare([str(source)], PrepareConfig(str(tmp_path / "out"), tokenizer="bytes", bpe_dropout=0.1))


def command(source: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "fastgpt",
        "data",
        str(source),
        "--out",
        str(out),
        "--tokenizer",
        "bytes",
        *options,
    ]


def big_jsonl(path: Path, megabytes: int) -> Path:
    """Write distinct documents of about 10 kB."""
    text = prose(1700)
    with path.open("w") as file:
        for i in range(100 * megabytes):
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    return path


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_nothing_that_opens(tmp_path: Path):
    source, out = big_jsonl(tmp_path / "in.jsonl", 12), tmp_path / "out"
    with subprocess.Popen(command(source, out), stderr=subprocess.DEVNULL) as process:
        working = tmp_path / ".writing-out"
        while not (working.is_dir() and any(file.stat().st_size > 100_000 for file in working.iterdir())):
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert not out.exists()
    with pytest.raises(DatasetError, match="incomplete"):
        open_dataset(working)
    assert prepare([str(source)], PrepareConfig(str(out), tokenizer="bytes")).kept == 1200
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small, out = write_jsonl(tmp_path / "small.jsonl", DOCUMENTS[:3]), tmp_path / "out"
    prepare([str(small)], PrepareConfig(str(out), tokenizer="bytes"))
    before = open_dataset(out).facts
    large = big_jsonl(tmp_path / "large.jsonl", 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        assert main(["data", str(large), "--out", str(out), "--tokenizer", "bytes", "--overwrite"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out could not be written" in capsys.readouterr().err
    assert open_dataset(out).facts == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.jsonl", "out", "small.jsonl"]


@pytest.mark.slow
def test_memory_is_flat_for_a_corpus_ten_times_as_large(tmp_path: Path):
    program = (
        "import resource, sys; from fastgpt.cli import main; assert main(sys.argv[1:]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for megabytes in (2, 20):
        source = big_jsonl(tmp_path / f"{megabytes}.jsonl", megabytes)
        arguments = command(source, tmp_path / f"out{megabytes}", "--repetition", "keep")[3:]
        run = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
        )
        peaks.append(int(run.stderr.split()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 6e6, peaks  # for 18 MB more text


REPETITIVE = "The same sentence says the same thing again and again, in the same words.\n\n" * 300


def test_a_repetitive_file_that_is_one_document_is_kept(tmp_path: Path):
    (tmp_path / "my.txt").write_text(REPETITIVE)
    report = prepare([str(tmp_path / "my.txt")], PrepareConfig(out=str(tmp_path / "out"), tokenizer="bytes"))
    assert report.read == report.kept == 1
    assert report.tokens["train"] > 0.8 * len(REPETITIVE)


@pytest.mark.parametrize("how", ["option", "separator", "directory", "records"])
def test_repetitive_documents_of_a_corpus_are_dropped(how: str, tmp_path: Path):
    source, options = tmp_path / "my.txt", {"repetition": "gopher"} if how == "option" else {}
    if how == "directory":
        source = tmp_path / "corpus"
        source.mkdir()
        (source / "a.txt").write_text(REPETITIVE)
    elif how == "records":
        source = tmp_path / "my.jsonl"
        source.write_text(json.dumps({"text": REPETITIVE}))
    else:
        source.write_text(REPETITIVE + ("\n<|endoftext|>\n" + REPETITIVE) * (how == "separator"))
    config = PrepareConfig(out=str(tmp_path / "out"), tokenizer="bytes", **options)
    with pytest.raises(
        ValueError, match=r"no document is left .* repeated .*--repetition keep keeps repetitive"
    ):
        prepare([str(source)], config)


def test_an_empty_separator_makes_paragraphs_documents(tmp_path: Path):
    (tmp_path / "my.txt").write_text("one\ntwo\n\n\nthree\n \nfour\n\nfive\n")
    config = PrepareConfig(out=str(tmp_path / "out"), tokenizer="bytes", separator="", val_share=0.0)
    report = prepare([str(tmp_path / "my.txt")], config)
    assert (report.read, report.kept, report.dropped) == (3, 3, {})
    written = documents(open_dataset(tmp_path / "out"), "train")
    assert written == ["one\ntwo\n", "three\n \nfour\n", "five\n"]
