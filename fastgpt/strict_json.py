"""JSON as RFC 8259 defines it: a number that is NaN or infinite, which JSON cannot hold, is written as null."""

from __future__ import annotations

import json
import math
from typing import Any


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
