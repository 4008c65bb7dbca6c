"""Result files: a list of records with the schema bench/schema.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]

EMPTY: Record = {
    "reason": None, "verified": False, "error": None, "seconds": None, "spread": None, "rounds": 0, "ratio": None,
    "ratio_low": None, "ratio_high": None, "flops": 0, "bytes": 0, "roofline_seconds": None,
    "share_of_roofline": None, "bound": None, "peak_bytes": None,
}  # fmt: skip


class Results:
    """The records of a run. With a path, every `add` saves all of them.

    Args:
        path: result file; None for records in memory only.
        facts: description of the machine (`Machine.facts`) for the first record.
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
        """List the records of our backends that failed or did not pass the check."""
        return [r for r in self.records if r["peer"] is None and r["status"] in ("wrong", "failed")]


def contender(record: Record) -> str:
    """Name the implementation of a record: the peer, or fastgpt with its backend."""
    return str(record["peer"] or f"fastgpt {record['backend']}")


def is_timed(record: Record) -> bool:
    """Return True for a record that ran, passed its check and has a time."""
    return record["status"] == "ok" and record["verified"] and bool(record["seconds"])


def save(path: Path, records: list[Record]) -> None:
    """Write records as JSON, one per line, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load(path: Path) -> list[Record]:
    """Read the records of a file.

    Raises:
        ValueError: the file is not a list of records whose first one describes the machine.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Use a file that `python -m bench` wrote.") from None
    if not isinstance(records, list) or not records or "device" not in records[0]:
        raise ValueError(f"{path} has no benchmark records. Use a file that `python -m bench` wrote.")
    return records
