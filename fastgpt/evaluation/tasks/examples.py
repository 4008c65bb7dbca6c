"""Examples of a task, read from files or embedded, and their split into training and held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.data.files import STANDARD_INPUT, name_of
from fastgpt.data.formats import JSON_LINES, TEXT, Record, format_of, list_keys, read_records
from fastgpt.evaluation.tasks.embedded import embedded

EMBEDDED = "embedded"
HELD_OUT = 0.1  # fraction of the examples


@dataclass(frozen=True)
class Example:
    """Input and expected output of a task."""

    input: str
    output: str


@dataclass(frozen=True)
class ExampleSet:
    """Training and held-out examples.

    Attributes:
        name: the source.
        train: the training examples.
        held_out: the held-out examples.
        skipped: number of records that were not examples.
    """

    name: str
    train: list[Example]
    held_out: list[Example]
    skipped: int = 0


def load_examples(task: str, source: str, *, skip_broken: bool = False) -> ExampleSet:
    """Load the examples of a source: "embedded", or a file as in `read_examples`.

    A hash of its input decides whether an example is held out, independently of the other examples, so that no input is
    in both parts. Embedded examples about the same number or function are in the same part. Examples are ordered by the
    hash.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is invalid, or all examples have the same input.
    """
    if source == EMBEDDED:
        items = [(item.key, Example(item.input, item.output)) for item in embedded(task)]
        return _hold_out(f"embedded examples of {task}", items, 0)
    examples, skipped = read_examples(source, skip_broken=skip_broken)
    return _hold_out(source, [(example.input, example) for example in examples], skipped)


def read_examples(path: str | Path, *, skip_broken: bool = False) -> tuple[list[Example], int]:
    """Read the examples of a file of records, {"input": ..., "output": ...} each, in their order.

    The file is JSON, CSV, TSV or Parquet by its name, else JSON Lines; "-" is standard input. Other keys and blank
    lines are ignored.

    Returns:
        The examples, and the number of records that were skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has no examples, or, unless `skip_broken` is set, a record is not an example; the message
            contains its number.
    """
    name = name_of(path)
    if str(path) != STANDARD_INPUT and not Path(path).exists():
        raise FileNotFoundError(f"file {path} does not exist; give a JSON Lines file, or {EMBEDDED}")
    kind = format_of(path)
    examples: list[Example] = []
    skipped = 0
    for record in read_records(path, JSON_LINES if kind == TEXT else kind, ("input", "output")):
        try:
            examples.append(_example(record))
        except ValueError as error:
            if not skip_broken:
                raise ValueError(
                    f"{record.location}: {error}; give --skip-broken to skip such records"
                ) from None
            skipped += 1
    if not examples:
        raise ValueError(f'{name} contains no examples; give lines of {{"input": "…", "output": "…"}}')
    return examples, skipped


def _example(record: Record) -> Example:
    """Convert a record. Raises ValueError if it is not an example."""
    if record.problem is not None:
        raise ValueError(record.problem)
    if not isinstance(record.value, dict):
        raise ValueError("not a JSON object")
    return Example(*(_field(record.value, name) for name in ("input", "output")))


def _field(record: dict[str, Any], name: str) -> str:
    if name not in record:
        raise ValueError(f"it lacks {name!r}; the keys are {list_keys([str(key) for key in record])}")
    text = record[name]
    if not isinstance(text, str):
        raise ValueError(f"{name!r} is not a string")
    if not text.strip():
        raise ValueError(f"{name!r} is empty")
    if "\0" in text:  # the byte tokenizer marks the end of a text with NUL
        raise ValueError(f"{name!r} contains a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} contains {text[error.start]!r}, which is not a character") from None
    return text


def _hold_out(name: str, items: Iterable[tuple[str, Example]], skipped: int) -> ExampleSet:
    """Split the examples by a hash of their keys; if none is held out, those with the smallest hash are."""
    hashed = sorted(((_hash(key), example) for key, example in items), key=lambda item: item[0])
    if not hashed or hashed[0][0] == hashed[-1][0]:
        raise ValueError(f"{name} has a single input; give at least two, to hold one out")
    bound = max(HELD_OUT, hashed[0][0])
    held_out = [example for value, example in hashed if value <= bound]
    return ExampleSet(name, [example for value, example in hashed if value > bound], held_out, skipped)


def _hash(key: str) -> float:
    """Hash a text to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "little") / 2**64
