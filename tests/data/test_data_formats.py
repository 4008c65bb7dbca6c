"""Formats: equal documents from every format, compressed or not; no record becomes prose or is lost silently."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt.cli import main
from fastgpt.data import (
    PrepareConfig,
    files,
    formats,
    load_corpus,
    load_documents,
    open_dataset,
    prepare,
    read_text,
)
from fastgpt.data.formats import format_of
from fastgpt.evaluation.tasks.examples import read_examples
from fastgpt.generation.text import read_prompts
from fastgpt.training.config import TrainConfig, read_toml
from fastgpt.training.datasets import open_training_data

TEXTS = [
    f"Text {i}, with a “quote”, a comma;\ta tab\nand {i} lines {{}}[]\\ of naïve שלום 😀" for i in range(14)
]
RECORDS = [{"id": i, "text": text, "meta": {"body": text, "n": i}} for i, text in enumerate(TEXTS)]


def zstandard(raw: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(raw)


def csv_of(delimiter: str) -> bytes:
    import csv

    text = io.StringIO()
    rows = csv.writer(text, delimiter=delimiter)
    rows.writerows([("id", "text"), *enumerate(TEXTS)])
    return text.getvalue().encode()


def parquet() -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    written = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS), written)
    return written.getvalue()


def lines() -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


CONTENTS: dict[str, Callable[[], bytes]] = {
    "jsonl": lines,
    "ndjson": lambda: b"\xef\xbb\xbf" + lines(),
    "jsonlines": lambda: lines().replace(b"\n", b"\r\n\r\n"),
    "json": lambda: json.dumps(RECORDS, indent=2).encode(),
    "json of strings": lambda: json.dumps(TEXTS).encode(),
    "json of lines": lines,
    "json with a mark": lambda: b"\xef\xbb\xbf \n" + json.dumps(RECORDS, ensure_ascii=False).encode(),
    "csv": lambda: csv_of(","),
    "csv of semicolons": lambda: b"\xef\xbb\xbf" + csv_of(";"),
    "tsv": lambda: csv_of("\t"),
    "parquet": parquet,
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}
CASES = [(name, packed) for name in CONTENTS for packed in PACKERS if not (packed and name == "parquet")]


def written(directory: Path, name: str, packed: str = "", upper: bool = False) -> Path:
    suffix = "." + name.split(maxsplit=1)[0] + packed
    path = directory / f"a.file{suffix.upper() if upper else suffix}"
    path.write_bytes(PACKERS[packed](CONTENTS[name]()))
    return path


def prepared(inputs: list[str], out: Path, **options: object) -> list[str]:
    """Read the documents of a data set in their order."""
    keep = {"tokenizer": "bytes", "val_share": 0.0, "normalization": "none", "repetition": "keep"}
    prepare(inputs, PrepareConfig(str(out), **{**keep, "markup": "keep", **options}))
    dataset = open_dataset(out)
    split = dataset.split("train")
    ends = split.document_ends.tolist()
    return [dataset.tokenizer().decode(split[a : b - 1]) for a, b in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(("name", "packed"), CASES)
def test_every_format_gives_its_texts(tmp_path: Path, name: str, packed: str, upper: bool):
    path = written(tmp_path, name, packed, upper)
    assert load_documents(str(path)) == TEXTS
    assert prepared([str(path)], tmp_path / "out") == TEXTS
    corpus = load_corpus(str(path))
    assert corpus.train + corpus.val == TEXTS and corpus.records and corpus.left_out == []


@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "csv of semicolons", "tsv", "parquet"])
def test_a_wrong_key_is_answered_with_those_that_are_there(tmp_path: Path, name: str):
    path = written(tmp_path, name)
    message = r"there is no text under 'body'; the keys with a text are .*'text'.*; name one with --text-key"
    with pytest.raises(ValueError, match=message) as error:
        load_documents(str(path), "body")
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=message):
        prepared([str(path)], tmp_path / "out", text_key="body")


@pytest.mark.parametrize("name", ["jsonl", "json", "parquet"])
def test_a_key_in_another(tmp_path: Path, name: str):
    path = written(tmp_path, name)
    assert load_documents(str(path), "meta.body") == TEXTS
    assert prepared([str(path)], tmp_path / "out", text_key="meta.body") == TEXTS
    with pytest.raises(ValueError, match=r"'meta\.body'"):
        load_documents(str(path), "meta.n")


def test_a_key_with_a_dot_in_its_name(tmp_path: Path):
    (tmp_path / "b.jsonl").write_text('{"a.b": "own", "a": {"b": "other"}}\n')
    assert load_documents(str(tmp_path / "b.jsonl"), "a.b") == ["own"]
    (tmp_path / "c.jsonl").write_text('{"a": [{"b": "third"}]}\n')
    assert load_documents(str(tmp_path / "c.jsonl"), "a.0.b") == ["third"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text": ', "is not JSON"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "the array has no end"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "record 1 is not followed by a comma"),
        ("a.json", b'[{"text": "a"}] and more', "text after the array"),
        ("a.json", b'{"version": 1, "name": "x"}', "the keys with a text are 'name'"),
        ("a.json", b"[1, 2]", "the record is of type int, not an object"),
        ("a.json", b"[]", "contains no record with a text"),
        ("a.json", b"\xff\xfe[", "UTF-16"),
        ("a.json", b'["K\xe4se"]', "not UTF-8"),
        ("a.csv", b"id,body\n1,a\n", "the keys with a text are 'id', 'body'"),
        ("a.csv", b"text\na,b\n", "line 2: it has 2 fields and the header 1 columns"),
        ("a.csv", b"text\n", "contains no record with a text"),
        ("a.parquet", b"PAR1 and no more", "is not a complete Parquet file"),
        ("a.parquet", b"", "is empty"),
        ("a.jsonl", b'{"text": "a\\u0000"}\n', "line 1: the text contains a NUL"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: the text contains a NUL or a surrogate"),
        (
            "a.jsonl",
            b'{"text": null}\n',
            "there is no text under 'text'; no key has a text; the keys are 'text'",
        ),
        ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-9], "damaged or truncated"),
        ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:30] + b"\0" * 30, "damaged or truncated"),
        ("a.txt.bz2", bz2.compress(b"text " * 999)[:-9], "damaged or truncated"),
        ("a.txt.xz", lzma.compress(b"text " * 999)[:-9], "damaged or truncated"),
        ("a.txt", "\ufefftext".encode("utf-16"), "UTF-16, not UTF-8 text; convert it"),
    ],
)
def test_what_is_damaged_or_of_no_use_is_refused_in_a_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
):
    pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_documents(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_damaged_zstandard_and_many_frames(tmp_path: Path):
    whole = zstandard(b"first ") + zstandard(b"second")
    (tmp_path / "a.zst").write_bytes(whole)
    assert read_text(tmp_path / "a.zst") == "first second"
    for damaged in (whole[:-3], whole[:20] + b"\xff" * 9):
        (tmp_path / "a.zst").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or truncated"):
            read_text(tmp_path / "a.zst")


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, package: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd and more")
    for module in [*sys.modules]:
        if module.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["data", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"pip install {package}" in error and str(tmp_path / name) in error


def test_a_small_file_that_unpacks_to_a_large_one_needs_little_memory(tmp_path: Path):
    script = "import resource, sys; from fastgpt.data.sources import Sources; from fastgpt.data.report import Report\n"
    script += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    script += (
        "n = sum(len(t) for t, _ in Sources([sys.argv[1]], 'text', 'x', False, Report('')).documents())\n"
    )
    script += "print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b"x" * 999_999 + b"\n")
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    count, mebibytes = map(int, done.stdout.split())
    assert count == 300_000_000 and mebibytes < 60


@pytest.mark.parametrize("packed", [*PACKERS][1:])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_file_that_unpacks_out_of_proportion_is_refused(
    tmp_path: Path, packed: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "_FREE", 1 << 16)
    path = tmp_path / (name + packed)
    record = {"a.jsonl": '{"text": "%s"}\n', "a.csv": "%s,\n"}.get(name, "%s \n")

    def write(count: int, text: Callable[[int], str]) -> None:
        texts = ["text", *map(text, range(count))]
        path.write_bytes(PACKERS[packed]("".join(record % text for text in texts).encode()))

    write(30_000, lambda i: "x" * 20)
    for read in (load_documents, lambda path: prepared([path], tmp_path / "out")):
        with pytest.raises(ValueError, match="expands to more than 200 times its size") as error:
            read(str(path))
        assert str(path) in str(error.value) and not (tmp_path / "out").exists()
    for count, text in ((1000, lambda i: "x" * 20), (10_000, lambda i: f"x{i:019}")):
        write(count, text)
        assert load_documents(str(path))


def test_a_parquet_file_whose_rows_share_a_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    monkeypatch.setattr(files, "_FREE", 1 << 20)
    path = tmp_path / "a.parquet"
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 100_000]))
    pyarrow.parquet.write_table(pa.table({"text": shared}), path, compression="zstd")
    assert path.stat().st_size < 2000
    with pytest.raises(ValueError, match="expands to more than 200 times its size"):
        load_documents(str(path))
    monkeypatch.setattr(formats, "_LONGEST", 99_999)
    with pytest.raises(ValueError, match="record 1 is longer than"):
        load_documents(str(path))


def test_a_parquet_file_with_values_that_python_has_not(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    broken = pa.array([b"a", b"\xff"]).view(pa.string())
    times = pa.array([1 << 62, 0], pa.timestamp("us"))
    for column in ({"text": broken}, {"time": times}):
        pyarrow.parquet.write_table(pa.table(column), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"a\.parquet, record \d cannot be read: .+"):
            load_documents(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "%s"}\n' % ("x" * 1000)),
        ("a.json", '[{"text": "a"}, {"text": "%s"}]' % ("x" * 200_000)),
        ("a.csv", "text\na\n" + "x" * 1000),
        ("a.csv", "text\n" + '"\n",' * 500),
        ("a.csv", ",".join(["text"] * 500)),
        ("a.tsv", "text\n" + "x\t" * 600),
    ],
    ids=["JSON Lines", "JSON", "CSV", "CSV of many lines", "header of CSV", "TSV"],
)
def test_a_record_of_any_length_is_not_read(
    tmp_path: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(formats, "_LONGEST", 999)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"longer than 0 MiB|field larger than field limit") as error:
        load_documents(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"text {i}", "utf-8-sig")
    assert not any("\ufeff" in text for text in load_documents(str(tmp_path)))
    assert read_text(tmp_path / "1.txt") == "text 1" and read_prompts(tmp_path / "2.txt") == ["text 2"]
    (tmp_path / "c.toml").write_text("max_steps = 3\n", "utf-8-sig")
    assert read_toml(tmp_path / "c.toml") == {"max_steps": 3}


def test_a_name_that_is_not_utf8(tmp_path: Path):
    name = os.fsdecode(b"a\xff.txt")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("text")
        (tmp_path / folder / "b.txt").write_text("more")
    assert load_documents(str(tmp_path / "one")) == load_documents(str(tmp_path / "two"))
    assert sorted(prepared([str(tmp_path / "one")], tmp_path / "out")) == ["more", "text"]


def test_prompts_are_not_records(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"is named as JSON Lines; give a text file"):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("name", ["json", "csv", "tsv", "jsonl.gz"])
def test_examples_of_a_task_in_every_format(tmp_path: Path, name: str):
    pairs = [("a, b", "x\ny"), ("c", "z")]
    path = tmp_path / f"e.{name}"
    if "json" in name:
        records = [{"input": a, "output": b} for a, b in pairs]
        text = json.dumps(records) if name == "json" else "\n".join(map(json.dumps, records))
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    else:
        delimiter = "," if name == "csv" else "\t"
        path.write_text(
            "\n".join(delimiter.join(f'"{x}"' for x in row) for row in [("input", "output"), *pairs])
        )
    assert [(e.input, e.output) for e in read_examples(path)[0]] == pairs


def test_records_are_packed_as_documents_and_text_is_a_stream(tmp_path: Path):
    options = {"block_size": 8, "batch_size": 2}
    path = written(tmp_path, "jsonl")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    assert open_training_data(TrainConfig(data=str(path), **options)).name.endswith("packed documents")
    assert open_training_data(TrainConfig(data=str(path), packing="stream", **options)).name.endswith(
        "one stream"
    )
    assert open_training_data(TrainConfig(data=str(tmp_path / "text.txt"), **options)).name.endswith(
        "one stream"
    )


def test_broken_records_are_left_out_of_training_on_request(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines() + b'{"text": 1}\n{"text": \n{"text": ""}\n')
    with pytest.raises(ValueError, match=r"line 15: there is no text under 'text'.*; give --skip-broken"):
        load_corpus(str(path))
    corpus = load_corpus(str(path), skip_broken=True)
    assert corpus.train + corpus.val == TEXTS
    assert [entry.partition(": ")[0] for entry in corpus.left_out] == [
        f"{path}, line 15",
        f"{path}, line 16",
        str(path),
    ]


def test_the_old_name_of_the_option_still_works(tmp_path: Path):
    path = written(tmp_path, "jsonl")
    for name in ("--text-field", "--text-key"):
        out = str(tmp_path / name)
        arguments = ["--tokenizer", "bytes", "--repetition", "keep", "--out", out]
        assert main(["data", str(path), name, "meta.body", *arguments]) == 0


def test_a_data_set_of_hugging_face_without_a_name():
    with pytest.raises(ValueError, match="hf: lacks the name of a data set"):
        prepare(["hf:"], PrepareConfig("unused", tokenizer="bytes"))
    with pytest.raises(ValueError, match="hf: lacks the name of a data set"):
        prepare(["hf:name@:train"], PrepareConfig("unused", tokenizer="bytes"))


def test_formats_are_known_by_their_names():
    for name, kind in {
        **{"a.JSONL": "JSON Lines", "a.b.ndjson.gz": "JSON Lines", "x.Json.ZST": "JSON", "a.csv.xz": "CSV"},
        **{
            "a.tab": "TSV",
            "a.pq": "Parquet",
            "a.txt": "text",
            "a": "text",
            ".json": "text",
            "a.py.gz": "text",
        },
        **{"json": "text", "-": "text", "a.jsonl.txt": "text", "a.gz": "text"},
    }.items():
        assert format_of(name) == kind, name
