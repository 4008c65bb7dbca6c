"""Format of dataset.json and of the arrays beside it, with the checks of both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.json_io import read_json, shown
from fastgpt.tokenizer_json import MOST_TOKENS

FORMAT = 1
SPLITS = ("train", "val")
_MOST = 1 << 62
# The header that NumPy writes before a 1-D array, in its formats 1 to 3 (numpy.lib.format).
_NPY = re.compile(
    rb"\x93NUMPY[\1-\3]\0(?:..|..\0\0)"
    rb"\{'descr': '([<>|]\w\d)', 'fortran_order': False, 'shape': \((\d{1,18}),\),? ?\} *\n",
    re.DOTALL,
)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of token ids below vocab_size in a shard."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def read_description(file: Path) -> dict[str, Any]:
    """Read and check a dataset.json.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a description of a data set.
    """
    facts = read_json(file)
    try:
        if "format" in facts and facts["format"] != FORMAT:
            raise ValueError(
                f"it has format {shown(facts['format'])}, and this version reads format {FORMAT}"
            )
        _check(facts)
    except ValueError as error:
        raise ValueError(f"{file} is not the description of a data set: {error}") from None
    return facts


def _check(facts: dict[str, Any]) -> None:
    vocab_size = _integer(facts, "vocab_size", 1, MOST_TOKENS)
    _integer(facts, "end_of_text", 0, vocab_size - 1)
    if facts.get("dtype") != token_dtype(vocab_size).name:
        raise ValueError(f"the dtype of {vocab_size} tokens is not {shown(facts.get('dtype'))}")
    for name, kind in (
        ("tokenizer", str),
        ("seed", int),
        *((name, dict) for name in ("report", "files", "splits")),
    ):
        if type(facts.get(name)) is not kind:
            raise ValueError(f"{name} is missing or has the wrong type")
    if sorted(facts["splits"]) != sorted(SPLITS):
        raise ValueError(f"the splits are not {', '.join(SPLITS)}")
    for name, split in facts["splits"].items():
        shards = split.get("shards") if type(split) is dict else None
        if type(shards) is not list:
            raise ValueError(f"the split {name!r} has no list of shards")
        for number, shard in enumerate(shards):
            if type(shard) is not dict or shard.get("name") != f"{name}-{number:05d}":
                raise ValueError(f"shard {number} of the split {name!r} has an unexpected name")
        for count in ("tokens", "documents"):
            if _integer(split, count, 0, _MOST) != sum(_integer(shard, count, 1, _MOST) for shard in shards):
                raise ValueError(f"{count} of the split {name!r} differs from the sum over its shards")


def _integer(facts: dict[str, Any], name: str, least: int, most: int) -> int:
    value = facts.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, not {shown(value)}")
    return value


def map_array(file: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    """Memory-map the array (count,) in a NumPy file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file contains another array.
    """
    with file.open("rb") as stream:
        header = _NPY.match(stream.read(1 << 12))
        size = stream.seek(0, 2)
    if (
        header is None
        or header[1] != dtype.str.encode()
        or int(header[2]) != count
        or size != header.end() + count * dtype.itemsize
    ):
        raise ValueError(f"{file} does not contain {count:,} numbers of type {dtype}")
    return np.memmap(file, dtype, "r", header.end(), (count,))
