"""The metrics of a training run: OUT/log.jsonl, one JSON object per line, also in memory; null is NaN or infinity."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastgpt.atomic_io import naming_errors, open_to_append, replace_file
from fastgpt.json_io import dumps, loads


class MetricsLog:
    """Append-only records with a "step" and values such as "train_loss" or "val_loss".

    A run that resumes at a step keeps the records up to it: the file equals that of an uninterrupted run.
    """

    def __init__(self, path: Path, *, resume_at: int | None = None) -> None:
        """Start an empty log at `path`, or keep the records of the existing one up to step `resume_at`."""
        self.records: list[dict[str, Any]] = []
        if resume_at is not None and path.exists():
            self.records = [record for record in _read(path) if record["step"] <= resume_at]
        self.path = path
        replace_file(path, "".join(map(_line, self.records)))
        self._stream = open_to_append(path)

    def add(self, step: int, **values: float) -> None:
        """Append a record, and hand it to the operating system at once."""
        self.records.append({"step": step, **values})
        with naming_errors(self.path):
            self._stream.write(_line(self.records[-1]))
            self._stream.flush()

    def curve(self, name: str) -> list[tuple[int, float]]:
        """The (step, value) of all records that have the value `name`."""
        return [(record["step"], record[name]) for record in self.records if record.get(name) is not None]

    def sync(self) -> None:
        """Have the records on the disk: before the checkpoint that they lead up to."""
        with naming_errors(self.path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        with naming_errors(self.path):  # what could not be written is tried again
            self._stream.close()


def _line(record: dict[str, Any]) -> str:
    return dumps(record) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """All whole records; the last line of a killed process may be half a one."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            record = loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path} is not the log of a run: it holds the line {line[:60]!r}")
        records.append(record)
    return records
