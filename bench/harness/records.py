"""Result files: a list of records (bench/schema.json), written whole after every addition."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]

EMPTY: Record = {
    "reason": None, "verified": False, "error": None, "seconds": None, "spread": None, "rounds": 0, "ratio": None,
    "ratio_low": None, "ratio_high": None, "flops": 0, "bytes": 0, "roof": None, "share_of_roof": None, "bound": None,
    "peak_bytes": None,
}  # fmt: skip


class Results:
    """The records of a run. With a path they are on disk, whole, after each `add`.

    Args:
        path: the file, or None to keep them in memory alone.
        facts: what the first record says of the machine (`Machine.facts`).
    """

    def __init__(self, path: Path | None, facts: Record) -> None:
        self.path = path
        self.facts = facts
        self.records: list[Record] = []

    def add(self, *records: Record) -> None:
        """Append records and write the file."""
        for record in records:
            self.records.append(record if self.records else record | self.facts)
        if self.path is not None:
            save(self.path, self.records)

    def wrong(self) -> list[Record]:
        """Our own records that did not pass their check or did not run: what makes a run fail."""
        return [r for r in self.records if r["peer"] is None and r["status"] in ("wrong", "failed")]


def save(path: Path, records: list[Record]) -> None:
    """Write records as JSON, one a line, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load(path: Path) -> list[Record]:
    """The records of a file.

    Raises ValueError where the file does not hold a list of records with a machine in the first.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list) or not records or "device" not in records[0]:
        raise ValueError(f"{path} holds no benchmark records: it must be a file that `python -m bench` wrote")
    return records
