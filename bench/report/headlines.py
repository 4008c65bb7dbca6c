"""Selection of the records that reports show, and formatting of their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.harness.records import Record, contender, is_timed

HEADLINE = ("op", "case", "dtype", "ours, ms", "of roofline", "fastest peer", "peer, ms", "speedup",
            "memory, ours / peer")  # fmt: skip


def unique(values: Iterable[Any]) -> list[Any]:
    """List the distinct values in the order of their first occurrence."""
    return list(dict.fromkeys(values))


def format_number(value: float) -> str:
    """Format a number with three significant digits."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    places = 2 - math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{value:.2e}" if abs(value) < 1e-4 else f"{round(value, places):.{max(0, places)}f}"


def format_ratio(ratio: float) -> str:
    """Format a ratio with at most two decimals: "1.20×"."""
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{format_number(ratio)}×"


def format_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit."""
    units = ["GiB", "MiB", "KiB", "B"]
    while count >= 1023.5 and len(units) > 1:
        count /= 1024
        units.pop()
    return f"{count:g} {units[-1]}" if count == int(count) else f"{format_number(count)} {units[-1]}"


def format_rate(rate: float, unit: str) -> str:
    """Format a rate with a decimal prefix from k to P."""
    step = min(5, max(0, math.floor(math.log10(rate) / 3 + 1e-9)))
    return f"{format_number(rate / 1e3**step)} {('', 'k', 'M', 'G', 'T', 'P')[step]}{unit}"


def format_ms(seconds: float) -> str:
    """Format seconds as milliseconds, without the unit."""
    return format_number(1e3 * seconds)


def format_percent(share: float) -> str:
    """Format a share as a percentage."""
    return f"{100 * share:.0f} %"


def cell(record: Record | None, key: str, form: Callable[[Any], str] = str) -> str:
    """Format a value of a record; a dash if there is none."""
    value = record.get(key) if record else None
    return "—" if value is None else form(value)


def ratio_cell(record: Record | None) -> str:
    """Format a peer's time over ours, with the 10th and 90th percentile of the rounds."""
    low, high = (record[key] if record else None for key in ("ratio_low", "ratio_high"))
    return cell(record, "ratio", format_ratio) + (f" ({low:.2f}–{high:.2f})" if low and high else "")


@dataclass(frozen=True)
class Headline:
    """The case that represents an op and dtype, forward + backward.

    Attributes:
        ours: record of our fastest verified backend; None without one.
        best_peer: record of the fastest verified peer; None without one.
        records: all records of the case.
    """

    op: str
    dtype: str
    case: str
    ours: Record | None
    best_peer: Record | None
    records: list[Record]

    def cells(self, name_backend: bool) -> list[str]:
        """Format the columns `HEADLINE`; with `name_backend` the time is followed by our backend."""
        ours, peer = self.ours, self.best_peer
        status = "/".join(unique(r["status"] for r in self.records if r["peer"] is None)) or "—"
        return [
            self.op,
            self.case,
            self.dtype,
            cell(ours, "seconds", format_ms) + f" {ours['backend']}" * name_backend if ours else status,
            cell(ours, "share_of_roofline", format_percent),
            contender(peer) if peer else "—",
            cell(peer, "seconds", format_ms),
            ratio_cell(peer if ours else None),
            " / ".join(cell(r, "peak_bytes", format_bytes) for r in (ours, peer)),
        ]


def headlines(records: list[Record]) -> list[Headline]:
    """Select, for each op and dtype, the largest case that a backend of ours computed correctly.

    The largest case has the most operations, then the most bytes.
    """
    found = []
    candidates = [r for r in records if r["group"] == "ops" and r["direction"] == "fwd+bwd"]
    pairs = unique((r["op"], r["dtype"]) for r in candidates)
    ops = unique(op for op, _ in pairs)
    for op, dtype in sorted(pairs, key=lambda pair: ops.index(pair[0])):
        same = [r for r in candidates if (r["op"], r["dtype"]) == (op, dtype)]
        own = [r for r in same if r["peer"] is None] or same
        case = max(own, key=lambda r: (is_timed(r), r["flops"], r["bytes"]))["case"]
        rows = [r for r in same if r["case"] == case]
        timed = sorted(filter(is_timed, rows), key=lambda r: (r["seconds"], contender(r)))
        ours = next((r for r in timed if r["peer"] is None), None)
        best_peer = next((r for r in timed if r["peer"] is not None), None)
        found.append(Headline(op, dtype, case, ours, best_peer, rows))
    return found


def headline_rows(records: list[Record]) -> list[list[str]]:
    """Format the headlines; our backends are named if the records have several."""
    several = len({r["backend"] for r in records if r["peer"] is None}) > 1
    return [h.cells(several) for h in headlines(records)]


def commit(facts: Record) -> str:
    """Shorten the commit of a run."""
    return (facts["commit"] or "unknown")[:12] + " with changes" * bool(facts["dirty"])
