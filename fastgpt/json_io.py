"""Strict JSON (RFC 8259) input and output, and TOML input.

NaN and infinity, which JSON does not support, are written as null. Input may come from an untrusted source: its size
and nesting are bounded, and any malformed input raises ValueError.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

_SHOWN = 80  # characters of a value in a message
MOST_BYTES = 256 << 20  # the largest files, tokenizer.json of large vocabularies, have tens of MiB


def finite(value: Any) -> Any:
    """Copy a value of dicts, lists and tuples, with None for every float that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def dumps(value: Any, **options: Any) -> str:
    """Serialize like `json.dumps`, without NaN and Infinity."""
    return json.dumps(finite(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Parse like `json.loads`. Raises ValueError for invalid or too deeply nested JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def loads_toml(text: str) -> dict[str, Any]:
    """Parse like `tomllib.loads`. Raises ValueError for invalid or too deeply nested TOML."""
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shown(value: Any) -> str:
    """Format a value from a file for a message: a number or a short text itself, the type of other values."""
    text = (
        repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
    )
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a UTF-8 file, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than MOST_BYTES, not JSON, or not an object; the message contains the file's name.
    """
    with file.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{file} is larger than {MOST_BYTES >> 20} MiB, the limit of JSON files")
    try:
        value = loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if type(value) is not dict:
        raise ValueError(f"{file} does not contain a JSON object")
    return value
