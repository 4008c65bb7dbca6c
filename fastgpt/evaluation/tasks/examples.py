"""Examples of a task, read from JSON Lines or made from what every Python has, and which of them are held out."""

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
HELD_OUT = 0.1  # the share that is never trained on


@dataclass(frozen=True)
class Example:
    """What a model is given, and what it is to write."""

    input: str
    output: str


@dataclass(frozen=True)
class ExampleSet:
    """Examples to learn from and examples held out; `skipped` lines were none."""

    name: str
    train: list[Example]
    held_out: list[Example]
    skipped: int = 0


def load_examples(task: str, source: str, *, skip_broken: bool = False) -> ExampleSet:
    """The examples that `source` names: "embedded", or a file as `read_examples` takes it.

    An example is held out by a hash of its input, so that it is on the same side whatever else a file holds, and no
    input is on both. Of embedded examples all about one number or one function are on the same side. The order is the
    hash's.

    Raises OSError and ValueError for what cannot be read, ValueError for a single example.
    """
    if source == EMBEDDED:
        items = [(item.key, Example(item.input, item.output)) for item in embedded(task)]
        return _hold_out(f"embedded examples of {task}", items, 0)
    examples, skipped = read_examples(source, skip_broken=skip_broken)
    return _hold_out(source, [(example.input, example) for example in examples], skipped)


def read_examples(path: str | Path, *, skip_broken: bool = False) -> tuple[list[Example], int]:
    """The examples in a file of records, {"input": …, "output": …} each, in their order, and how many records held none
    and were left out. It is JSON Lines, or JSON, CSV, TSV or Parquet by its name; "-" is standard input. Other keys are
    ignored, and so are blank lines.

    Raises OSError for a file that cannot be read; ValueError for one without examples, and, with its number, for a line
    that is no example unless `skip_broken` is true.
    """
    name = name_of(path)
    if str(path) != STANDARD_INPUT and not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}; a task takes a JSON Lines file, or {EMBEDDED}")
    kind = format_of(path)
    examples: list[Example] = []
    skipped = 0
    for record in read_records(path, JSON_LINES if kind == TEXT else kind, ("input", "output")):
        try:
            examples.append(_example(record))
        except ValueError as error:
            if not skip_broken:
                raise ValueError(f"{record.location}: {error}; --skip-broken leaves such lines out") from None
            skipped += 1
    if not examples:
        raise ValueError(f'{name} holds no examples; it takes lines of {{"input": "…", "output": "…"}}')
    return examples, skipped


def _example(record: Record) -> Example:
    """The example in a record. Raises ValueError for what is wrong with it."""
    if record.problem is not None:
        raise ValueError(record.problem)
    if not isinstance(record.value, dict):
        raise ValueError("not a JSON object")
    return Example(*(_field(record.value, name) for name in ("input", "output")))


def _field(record: dict[str, Any], name: str) -> str:
    if name not in record:
        raise ValueError(f"there is no {name!r}; the keys are {list_keys([str(key) for key in record])}")
    text = record[name]
    if not isinstance(text, str):
        raise ValueError(f"{name!r} is not a string")
    if not text.strip():
        raise ValueError(f"{name!r} is empty")
    if "\0" in text:  # the end of a text of bytes
        raise ValueError(f"{name!r} holds a NUL")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} holds {text[error.start]!r}, which is no character") from None
    return text


def _hold_out(name: str, items: Iterable[tuple[str, Example]], skipped: int) -> ExampleSet:
    """The examples on their sides, by a hash of their keys; if none is held out, those of the smallest hash are."""
    hashed = sorted(((_hash(key), example) for key, example in items), key=lambda item: item[0])
    if not hashed or hashed[0][0] == hashed[-1][0]:
        raise ValueError(f"{name} holds one input alone; to hold one out takes at least two")
    bound = max(HELD_OUT, hashed[0][0])
    held_out = [example for value, example in hashed if value <= bound]
    return ExampleSet(name, [example for value, example in hashed if value > bound], held_out, skipped)


def _hash(key: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "little") / 2**64
