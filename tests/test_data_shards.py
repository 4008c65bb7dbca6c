"""Token shards: what is written is read, across borders, and what is not whole is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.atomic_io import fingerprint
from fastgpt.data import DatasetError, DatasetWriter, TokenDataset, is_dataset, open_dataset
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer

DOCUMENTS = [b"alpha", b"b", b"gamma delta" * 5, b"e" * 40]


def write(out: Path, documents: list[bytes] = DOCUMENTS, **options: int) -> TokenDataset:
    with DatasetWriter(out, ByteTokenizer(), **options) as writer:
        for document in documents:
            writer.add("train", list(document))
        writer.add("val", list(b"held out"))
        writer.finish({"note": 1})
    return open_dataset(out)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 60),
    data=st.data(),
)
def test_reading_across_shards_is_reading_their_concatenation(
    lengths: list[int], shard_tokens: int, data: st.DataObject
):
    documents = [bytes(1 + (7 * i + j) % 255 for j in range(n)) for i, n in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        train = write(Path(folder) / "set", documents, shard_tokens=shard_tokens).split("train")
        whole = torch.tensor(list(b"".join(document + b"\0" for document in documents)))
        assert len(train) == len(whole)
        assert train.document_ends.tolist() == (torch.nonzero(whole == 0)[:, 0] + 1).tolist()
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole)))
        part = train[start:stop]
        assert part.dtype == torch.int64 and torch.equal(part, whole[start:stop])


def test_a_data_set_says_what_it_is(tmp_path: Path):
    dataset = write(tmp_path / "set", seed=7, shard_tokens=20)
    facts = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert facts == dataset.facts and facts["seed"] == 7 and facts["report"] == {"note": 1}
    assert [shard["tokens"] for shard in facts["splits"]["train"]["shards"]] == [64, 41]
    assert facts["splits"]["val"]["documents"] == 1 and facts["dtype"] == "uint16"
    assert dataset.tokenizer().decode(dataset.split("val")[0:8]) == "held out"
    shard = np.load(tmp_path / "set" / "train-00000.npy")
    assert shard.dtype == np.uint16 and bytes(shard[:6].astype(np.uint8)) == b"alpha\0"
    assert np.load(tmp_path / "set" / "train-00000.ends.npy").tolist() == [6, 8, 64]
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
    with pytest.raises(DatasetError, match="no split 'test'; it has train, val"):
        dataset.split("test")
    for start, stop in ((-1, 3), (4, 3), (0, 106)):
        with pytest.raises(IndexError, match="among the 105"):
            dataset.split("train")[start:stop]


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path):
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 65537)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w1"}
    with DatasetWriter(
        tmp_path / "set", BPETokenizer(json.dumps({"model": model, "added_tokens": []}))
    ) as writer:
        writer.add("train", torch.tensor([65536, 1, 65535]))
        writer.finish({})
    dataset = open_dataset(tmp_path / "set")
    assert dataset.facts["dtype"] == "uint32"
    assert dataset.split("train")[0:4].tolist() == [65536, 1, 65535, 0]
    with pytest.raises(DatasetError, match=r"'val' .* holds no document"):
        dataset.split("val")


def test_what_is_no_document_is_refused(tmp_path: Path):
    with DatasetWriter(tmp_path / "set", ByteTokenizer()) as writer:
        for ids, message in [([256], "outside the vocabulary"), ([-1], "outside"), ([1, 0], "end of text")]:
            with pytest.raises(ValueError, match=message):
                writer.add("train", ids)
    assert not list(tmp_path.iterdir())
    without = json.loads(BPETokenizer.train(["a b"], 258).engine.to_str())
    without["added_tokens"] = []
    without["model"]["vocab"]["nothing"] = without["model"]["vocab"].pop("<|endoftext|>")
    with pytest.raises(ValueError, match="no end of text"):
        DatasetWriter(tmp_path / "set", BPETokenizer(json.dumps(without)))


def test_damage_is_refused_and_the_file_is_named(tmp_path: Path):
    path = tmp_path / "set"
    write(path)
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    for name, content in whole.items():
        if name == "dataset.json":
            continue
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        for damaged, message in (
            (flipped, "SHA-256"),
            (content[:-1], "bytes, and dataset.json says"),
            (None, "lacks"),
        ):
            (path / name).unlink() if damaged is None else (path / name).write_bytes(damaged)
            with pytest.raises(DatasetError, match=message) as error:
                open_dataset(path)
            assert name in str(error.value)
        (path / name).write_bytes(content)
    for text in ("", "{}", "[]", '{"format": 1, "files": []}', '{"format": 1, "files": {"x": 1}}'):
        (path / "dataset.json").write_text(text)
        with pytest.raises(DatasetError, match=r"not the description|is not JSON|does not hold an object"):
            open_dataset(path)
    (path / "dataset.json").write_bytes(whole["dataset.json"].replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(DatasetError, match="format 2"):
        open_dataset(path)


def forge(path: Path, name: str, array: np.ndarray) -> None:
    """Write another array and put its size and checksum into dataset.json, so that only its content is wrong."""
    np.save(path / name, array)
    list_again(path, name)


def list_again(path: Path, name: str) -> None:
    """Put the size and checksum of a file into dataset.json."""
    facts = json.loads((path / "dataset.json").read_text())
    facts["files"][name] = fingerprint(path / name)
    (path / "dataset.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-00000.npy", np.full(105, 300, np.uint16), "token 300, and the vocabulary has 256"),
        ("train-00000.npy", np.zeros(104, np.uint16), "does not hold 105 numbers"),
        ("train-00000.npy", np.zeros(105, np.int64), "does not hold 105 numbers of type uint16"),
        ("train-00000.ends.npy", np.array([6, 8, 64, 104]), "does not part"),
        ("train-00000.ends.npy", np.array([6, 64, 8, 105]), "does not part"),
        ("train-00000.ends.npy", np.array([6, 8, 105]), "does not hold 4 numbers"),
        ("train-00000.ends.npy", np.array([6.0, 8, 64, 105]), "does not hold 4 numbers of type int64"),
        ("train-00000.ends.npy", np.array([-(2**63), 8, 64, 105]), "does not part"),
    ],
)
def test_wrong_content_under_a_right_checksum_is_refused(
    tmp_path: Path, name: str, array: np.ndarray, message: str
):
    write(tmp_path / "set")
    forge(tmp_path / "set", name, array)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path / "set")


def changed(facts: dict, place: str, value: object) -> dict:
    """A copy with another value at a place such as splits.train.shards.0.name."""
    copy = json.loads(json.dumps(facts))
    *parents, last = (int(part) if part.isdigit() else part for part in place.split("."))
    found = copy
    for part in parents:
        found = found[part]
    found[last] = value
    return copy


@pytest.mark.parametrize(
    ("place", "values"),
    {
        "format": [2, "1", None],
        "vocab_size": [0, -1, True, 256.0, "256", None, 257, 1000, 1 << 24, 10**30],
        "end_of_text": [True, -1, 256, 1, None, 0.0],
        "dtype": ["float64", "int16", "object", "uint32", "uint8", ">u2", 5, None, [], {}],
        "seed": [True, 1.5, "7", None],
        "tokenizer": [5, None],
        "report": [[], None],
        "files": [[], None, {}, {"../x": {"size": 1, "sha256": ""}}, {"train-00000.npy": 5}],
        "splits": [[], None, {}, {"train": {}}, {"train": [], "val": []}],
        "splits.train": [[], None, 5],
        "splits.train.tokens": [-1, 104, 105.0, 10**30, "105", None],
        "splits.train.documents": [-1, 5, True, None],
        "splits.train.shards": [{}, None, [], [5], [{}]],
        "splits.train.shards.0.name": ["../x", "/etc/passwd", "val-00000", "train-00001", 5, None, ""],
        "splits.train.shards.0.tokens": [0, -105, 104, 10**15, None],
        "splits.train.shards.0.documents": [0, -4, 3, 10**15, None],
    }.items(),
)
def test_a_description_that_lies_is_refused_in_one_message(tmp_path: Path, place: str, values: list[object]):
    write(tmp_path / "set")
    facts = json.loads((tmp_path / "set" / "dataset.json").read_text())
    counts = place.removeprefix("splits.train.shards.0.")
    for value in values:
        lie = changed(facts, place, value)
        if counts != place and type(value) is int:
            lie = changed(lie, f"splits.train.{counts}", value)
        (tmp_path / "set" / "dataset.json").write_text(json.dumps(lie))
        for verify in (True, False):
            with pytest.raises(DatasetError) as error:
                open_dataset(tmp_path / "set", verify)
            assert "\n" not in str(error.value) and len(str(error.value)) < 400


HEADER = "{'descr': '%s', 'fortran_order': %s, 'shape': %s, }"


@pytest.mark.parametrize("name", ["train-00000.npy", "train-00000.ends.npy"])
@pytest.mark.parametrize(
    "header",
    [
        *(
            HEADER % ("<i8", "False", shape)
            for shape in ("(10**15,)", "(1000000000000000,)", "(-1,)", "(105, 1)")
        ),
        *(
            HEADER % ("<i8", "False", shape)
            for shape in ("()", "(4)", "(True,)", "(1e3,)", "[4]", "(%s,)" % ("9" * 99))
        ),
        *(HEADER % (kind, "False", "(105,)") for kind in ("|O", "<u9", "<f8", ">u2", "|V8", "<U4", "bad")),
        *(HEADER % ("<u2", order, "(105,)") for order in ("True", "1", "None")),
        *("{}", "[", "-" * 5000 + "1", "(" * 5000, "__import__('os').abort()", "\0" * 100, ""),
    ],
)
def test_the_header_of_an_array_that_lies_is_refused_in_one_message(tmp_path: Path, name: str, header: str):
    path = tmp_path / "set"
    write(path)
    content = np.load(path / name).tobytes()
    text = header.ljust(118) + "\n"
    magic = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
    (path / name).write_bytes(magic + text.encode() + content)
    list_again(path, name)
    with pytest.raises(DatasetError, match="does not hold") as error:
        open_dataset(path)
    assert "\n" not in str(error.value)


def test_an_archive_or_a_pickle_is_no_array(tmp_path: Path):
    path = tmp_path / "set"
    write(path)
    for save in (lambda file: np.savez(file, a=np.zeros(105)), lambda file: np.save(file, np.array([{}, 1]))):
        with (path / "train-00000.npy").open("wb") as file:
            save(file)
        list_again(path, "train-00000.npy")
        with pytest.raises(DatasetError, match="does not hold"):
            open_dataset(path)


def test_sizes_are_looked_at_even_unverified(tmp_path: Path):
    path = tmp_path / "set"
    write(path)
    file = path / "train-00000.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-2] + b"zz")
    open_dataset(path, verify=False)
    file.write_bytes(content[:-2])
    with pytest.raises(DatasetError, match="is damaged"):
        open_dataset(path, verify=False)


def test_an_unfinished_or_foreign_directory_is_refused(tmp_path: Path):
    with pytest.raises(DatasetError, match="there is no data set directory"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(DatasetError, match="not finished"):
        open_dataset(tmp_path)
    assert not is_dataset(tmp_path)


def test_nothing_is_overwritten_unasked(tmp_path: Path):
    path, foreign = tmp_path / "set", tmp_path / "foreign"
    write(path)
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="give --overwrite"):
        write(path)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="is no prepared data set"):
            write(foreign, **options)
    assert (foreign / "thesis.txt").read_text() == "years"
    assert len(write(path, [b"new"], overwrite=True).split("train")) == 4
    assert sorted(tmp_path.iterdir()) == [foreign, path]


def test_a_failed_overwrite_keeps_what_was_there(tmp_path: Path):
    path = tmp_path / "set"
    write(path)
    with (
        pytest.raises(RuntimeError, match="trouble"),
        DatasetWriter(path, ByteTokenizer(), overwrite=True) as writer,
    ):
        writer.add("train", [1, 2, 3])
        raise RuntimeError("trouble")
    assert len(open_dataset(path).split("train")) == 105
    assert list(tmp_path.iterdir()) == [path]


def test_a_death_between_the_two_renames_is_made_good(tmp_path: Path):
    path = tmp_path / "set"
    write(path)
    path.rename(tmp_path / ".writing-set.old")
    with pytest.raises(FileExistsError, match="give --overwrite"):
        write(path, [b"new"])
    assert len(open_dataset(path).split("train")) == 105


def test_a_death_after_the_two_renames_leaves_no_obstacle(tmp_path: Path):
    for name in ("set", ".writing-set.old"):
        write(tmp_path / name)
    write(tmp_path / "set", [b"new"], overwrite=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def a_link(place: Path, precious: Path) -> None:
    place.symlink_to(precious)


def a_dangling_link(place: Path, precious: Path) -> None:
    place.symlink_to(precious / "absent")


def a_file(place: Path, precious: Path) -> None:
    place.write_text("years")


def a_pipe(place: Path, precious: Path) -> None:
    os.mkfifo(place)


def a_foreign_file(place: Path, precious: Path) -> None:
    place.mkdir()
    (place / "train-00000.npy").write_text("years")
    (place / "thesis.txt").write_text("years")


def a_link_with_a_name_of_ours(place: Path, precious: Path) -> None:
    place.mkdir()
    (place / "train-00000.npy").symlink_to(precious / "train-00000.npy")


def a_directory_with_a_name_of_ours(place: Path, precious: Path) -> None:
    (place / "train-00000.npy").mkdir(parents=True)


def everything(root: Path) -> dict[str, str | bytes]:
    """What is below a directory: names, and what links lead to and files hold."""
    found: dict[str, str | bytes] = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
    return found


@pytest.mark.parametrize(
    "obstacle",
    [
        *(a_link, a_dangling_link, a_file, a_pipe, a_foreign_file),
        *(a_link_with_a_name_of_ours, a_directory_with_a_name_of_ours),
    ],
)
@pytest.mark.parametrize("name", [".writing-set", ".writing-set.old"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_left_in_the_way_is_neither_removed_nor_followed(
    tmp_path: Path, obstacle: Callable[[Path, Path], None], name: str, overwrite: bool
):
    (tmp_path / "precious").mkdir()
    for file in ("thesis.txt", "train-00000.npy", "dataset.json"):
        (tmp_path / "precious" / file).write_text("years")
    (tmp_path / "shared").mkdir()
    if overwrite:
        write(tmp_path / "shared" / "set")
    obstacle(tmp_path / "shared" / name, tmp_path / "precious")
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=rf"{name} is in the way"):
        write(tmp_path / "shared" / "set", overwrite=overwrite)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", "notes/train-00000.npy", "train-00009.npy/thesis.txt"])
def test_a_data_set_with_foreign_files_is_not_overwritten(tmp_path: Path, name: str):
    write(tmp_path / "set")
    (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "set" / name).write_text("years")
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=f"it holds {name.partition('/')[0]}"):
        write(tmp_path / "set", overwrite=True)
    assert everything(tmp_path) == before


def test_foreign_files_that_come_while_it_is_written_stay(tmp_path: Path):
    with DatasetWriter(tmp_path / "set", ByteTokenizer()) as writer:
        writer.add("train", [1])
        (tmp_path / ".writing-set" / "thesis.txt").write_text("years")
    assert everything(tmp_path) == {".writing-set": "", ".writing-set/thesis.txt": b"years"}


def test_one_process_writes_at_a_time(tmp_path: Path):
    with DatasetWriter(tmp_path / "set", ByteTokenizer()) as first:
        with pytest.raises(FileExistsError, match="another process is writing"):
            DatasetWriter(tmp_path / "set", ByteTokenizer())
        first.add("train", [1])
        first.finish({})
    assert len(open_dataset(tmp_path / "set").split("train")) == 2


@pytest.mark.parametrize("limit", [5, 600, 1 << 20], ids=["tokenizer", "description", "tokens"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, limit: int):
    """No file may grow beyond `limit` bytes: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"set could not be written \(.*\); nothing of it remains"):
            write(tmp_path / "set", [b"x" * 100_000] * 10 if limit > 600 else [b"x"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_nothing_that_opens_and_no_obstacle(tmp_path: Path):
    program = (
        "import sys, itertools; from fastgpt.data import DatasetWriter; from fastgpt.tokenizer import ByteTokenizer\n"
        "with DatasetWriter(sys.argv[1], ByteTokenizer(), shard_tokens=1000) as writer:\n"
        "    for i in itertools.count():\n"
        "        writer.add('train', [1] * 300)\n"
        "        if i == 50: print('writing', flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "set")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "set").exists()
    with pytest.raises(DatasetError, match="not finished"):
        open_dataset(tmp_path / ".writing-set")
    write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
