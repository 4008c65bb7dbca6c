"""Token shards: round trips across shard borders, and rejection of incomplete data sets."""

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
        with pytest.raises(IndexError, match="outside this split of 105"):
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
    with pytest.raises(DatasetError, match=r"'val' .* is empty"):
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
            (content[:-1], r"bytes, not \d+ as in dataset.json"),
            (None, "lacks"),
        ):
            (path / name).unlink() if damaged is None else (path / name).write_bytes(damaged)
            with pytest.raises(DatasetError, match=message) as error:
                open_dataset(path)
            assert name in str(error.value)
        (path / name).write_bytes(content)
    for text in ("", "{}", "[]", '{"format": 1, "files": []}', '{"format": 1, "files": {"x": 1}}'):
        (path / "dataset.json").write_text(text)
        with pytest.raises(
            DatasetError, match=r"not the description|is not JSON|does not contain a JSON object"
        ):
            open_dataset(path)
    (path / "dataset.json").write_bytes(whole["dataset.json"].replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(DatasetError, match="format 2"):
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
    with pytest.raises(DatasetError, match=r"data set directory .* does not exist"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(DatasetError, match="is incomplete"):
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
        with pytest.raises(FileExistsError, match="is not a prepared data set"):
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
    """List the entries below a directory, with targets of links and contents of files."""
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
    with pytest.raises(FileExistsError, match=rf"{name} cannot be used"):
        write(tmp_path / "shared" / "set", overwrite=overwrite)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", "notes/train-00000.npy", "train-00009.npy/thesis.txt"])
def test_a_data_set_with_foreign_files_is_not_overwritten(tmp_path: Path, name: str):
    write(tmp_path / "set")
    (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "set" / name).write_text("years")
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=f"it contains {name.partition('/')[0]}"):
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
    """Simulate a full disk with a limit of the file size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"set could not be written \(.*\); no partial files remain"):
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
    with pytest.raises(DatasetError, match="is incomplete"):
        open_dataset(tmp_path / ".writing-set")
    write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
