"""Checks of the contents of a data set's files, even if their checksums are correct."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastgpt.atomic_io import fingerprint
from fastgpt.data import DatasetError, open_dataset
from tests.data.test_data_shards import write


def forge(path: Path, name: str, array: np.ndarray) -> None:
    """Write another array with a matching size and checksum in dataset.json."""
    np.save(path / name, array)
    list_again(path, name)


def list_again(path: Path, name: str) -> None:
    """Write the size and checksum of a file to dataset.json."""
    facts = json.loads((path / "dataset.json").read_text())
    facts["files"][name] = fingerprint(path / name)
    (path / "dataset.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-00000.npy", np.full(105, 300, np.uint16), "token 300, but the vocabulary has 256"),
        ("train-00000.npy", np.zeros(104, np.uint16), "does not contain 105 numbers"),
        ("train-00000.npy", np.zeros(105, np.int64), "does not contain 105 numbers of type uint16"),
        ("train-00000.ends.npy", np.array([6, 8, 64, 104]), "does not match"),
        ("train-00000.ends.npy", np.array([6, 64, 8, 105]), "does not match"),
        ("train-00000.ends.npy", np.array([6, 8, 105]), "does not contain 4 numbers"),
        ("train-00000.ends.npy", np.array([6.0, 8, 64, 105]), "does not contain 4 numbers of type int64"),
        ("train-00000.ends.npy", np.array([-(2**63), 8, 64, 105]), "does not match"),
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
    """Copy a description with another value at a path such as splits.train.shards.0.name."""
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
    with pytest.raises(DatasetError, match="does not contain") as error:
        open_dataset(path)
    assert "\n" not in str(error.value)


def test_an_archive_or_a_pickle_is_no_array(tmp_path: Path):
    path = tmp_path / "set"
    write(path)
    for save in (lambda file: np.savez(file, a=np.zeros(105)), lambda file: np.save(file, np.array([{}, 1]))):
        with (path / "train-00000.npy").open("wb") as file:
            save(file)
        list_again(path, "train-00000.npy")
        with pytest.raises(DatasetError, match="does not contain"):
            open_dataset(path)
