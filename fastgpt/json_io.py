"""JSON as RFC 8259 defines it, written and read; and TOML, read.

A number that is NaN or infinite, which JSON cannot hold, is written as null. What is read may be from anybody: its size
and its nesting are bounded, and every way in which it is malformed ends in one ValueError.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

_SHOWN = 80  # characters of a value
MOST_BYTES = 256 << 20  # tokenizer.json of the largest vocabularies has tens of MiB


def finite(value: Any) -> Any:
    """Copy a value of dicts, lists and tuples with None for every float that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def dumps(value: Any, **options: Any) -> str:
    """Serialize as `json.dumps` does, without NaN and Infinity."""
    return json.dumps(finite(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Parse as `json.loads` does. Raises ValueError for text that is not JSON or is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def loads_toml(text: str) -> dict[str, Any]:
    """Parse as `tomllib.loads` does. Raises ValueError for text that is not TOML or is nested too deep."""
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def shown(value: Any) -> str:
    """A value from a file for a message: a number or a short text as it is, of others the type."""
    text = (
        repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
    )
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of UTF-8, with a byte order mark or without.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than MOST_BYTES, not JSON, or no object; the message names the file.
    """
    with file.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{file} is larger than {MOST_BYTES >> 20} MiB, and a description is not")
    try:
        value = loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if type(value) is not dict:
        raise ValueError(f"{file} does not hold an object of JSON")
    return value
