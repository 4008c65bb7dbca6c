"""Report of the preparation of a data set, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

_SHOWN = 60  # characters of an example
MOST_LINES = 100  # skipped files that are listed


@dataclass
class Report:
    """Counts of documents, tokens and time; read = kept + the sum of dropped.

    Attributes:
        out: directory of the data set.
        read: documents read.
        kept: documents written.
        bytes: UTF-8 bytes of the documents read.
        changed: documents changed by cleaning, by kind of change.
        dropped: documents dropped, by reason.
        skipped: lines and files without a document, by reason.
        left_out: a line for each file, link and directory that was skipped below a directory, with the reason.
        examples: for each reason, the beginning of the first document, or the location of the first line or file.
        tokens: tokens by split, ends of text included.
        documents: documents by split.
        vocab_size: size of the tokenizer's vocabulary.
        seconds: total time.
        learning_seconds: part of it until the tokenizer was ready.
    """

    out: str
    read: int = 0
    kept: int = 0
    bytes: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    examples: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    vocab_size: int = 0
    seconds: float = 0.0
    learning_seconds: float = 0.0

    @property
    def mb_per_second(self) -> float:
        """Megabytes (10^6 bytes) of text read per second of `seconds`."""
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0

    def drop(self, reason: str, text: str) -> None:
        """Count a dropped document."""
        count(self.dropped, reason)
        self.examples.setdefault(reason, repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…"))

    def skip(self, reason: str, location: str) -> None:
        """Count a line or file without a document."""
        count(self.skipped, reason)
        self.examples.setdefault(reason, location)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the megabytes per second as values for JSON."""
        return asdict(self) | {"mb_per_second": self.mb_per_second}

    def table(self) -> str:
        """Format the report as a table."""
        rows = [("documents read", self.read, f"{self.bytes:,} bytes"), ("  kept", self.kept, "")]
        rows += [(f"  changed: {step}", number, "") for step, number in sorted(self.changed.items())]
        rows += [
            (f"  {verb}: {reason}", number, self.examples[reason])
            for verb, reasons in (("dropped", self.dropped), ("skipped", self.skipped))
            for reason, number in sorted(reasons.items())
        ]
        rows += [
            (f"tokens, {split}", number, f"{self.documents[split]:,} documents")
            for split, number in self.tokens.items()
        ]
        width = max(len(name) for name, *_ in rows)
        lines = [f"{name:<{width}}{number:>15,}  {more}".rstrip() for name, number, more in rows]
        speed = f"{self.seconds:.1f} s, {self.mb_per_second:.1f} MB/s"
        lines += left_out_lines(self.left_out)
        return "\n".join([*lines, f"{self.out}: {speed}; {self.vocab_size:,} tokens in the vocabulary"])


def left_out_lines(left_out: list[str]) -> list[str]:
    """Format a line for each of the first MOST_LINES skipped files, and one for the number of the others."""
    lines = [f"left out {entry}" for entry in left_out[:MOST_LINES]]
    more = len(left_out) - MOST_LINES
    return [*lines, f"left out {more:,} more"] if more > 0 else lines


def count(counts: dict[str, int], key: str, number: int = 1) -> None:
    """Add to a count that may not exist yet."""
    counts[key] = counts.get(key, 0) + number
