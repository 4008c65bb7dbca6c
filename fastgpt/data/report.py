"""What became of the documents of a corpus, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

_SHOWN = 60  # characters of an example
MOST_LINES = 100  # about files that were not read


@dataclass
class Report:
    """read = kept + the sum of dropped.

    Attributes:
        out: the data set's directory.
        read, kept: documents.
        bytes: of the documents read, in UTF-8.
        changed: clean documents that were not so before, by what changed them.
        dropped: documents by reason.
        skipped: lines and files that gave no document, by reason.
        left_out: of directories, each file, link and directory that was not read, with the reason.
        examples: for each reason, the beginning of the first document, or where the first line or file is.
        tokens, documents: by split, ends of text included.
        vocab_size: tokens that the tokenizer knows.
        seconds: of everything; learning_seconds: of those, until there was a tokenizer.
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
        """10^6 bytes of text read a second of `seconds`."""
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0

    def drop(self, reason: str, text: str) -> None:
        """Count a document that is left out."""
        count(self.dropped, reason)
        self.examples.setdefault(reason, repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…"))

    def skip(self, reason: str, place: str) -> None:
        """Count a line or file that is none."""
        count(self.skipped, reason)
        self.examples.setdefault(reason, place)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, and the megabytes a second."""
        return asdict(self) | {"mb_per_second": self.mb_per_second}

    def table(self) -> str:
        """The report for people."""
        rows = [("documents read", self.read, f"{self.bytes:,} bytes"), ("  kept", self.kept, "")]
        rows += [(f"  changed: {what}", number, "") for what, number in sorted(self.changed.items())]
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
    """A line for each file that was not read, and one for those beyond MOST_LINES."""
    lines = [f"left out {entry}" for entry in left_out[:MOST_LINES]]
    more = len(left_out) - MOST_LINES
    return [*lines, f"left out {more:,} more"] if more > 0 else lines


def count(counts: dict[str, int], what: str, number: int = 1) -> None:
    """Add to a count that may not have begun."""
    counts[what] = counts.get(what, 0) + number
