"""Which records stand for the rest, and how their numbers are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.harness.records import Record

K = TypeVar("K", bound=Hashable)


def contender(record: Record) -> str:
    """Who was measured: a peer by its name, ours by backend."""
    return str(record["peer"] or f"fastgpt {record['backend']}")


def right(record: Record) -> bool:
    """Whether a record counts: it ran, its results were checked, and it has a time."""
    return record["status"] == "ok" and record["verified"] and bool(record["seconds"])


def unique(values: Iterable[K]) -> list[K]:
    """The values without repetitions, in the order in which they come first."""
    return list(dict.fromkeys(values))


def digits(value: float) -> str:
    """A number to three significant digits."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    places = 2 - math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{value:.2e}" if abs(value) < 1e-4 else f"{round(value, places):.{max(0, places)}f}"


def times(ratio: float) -> str:
    """A ratio, to the second decimal at most."""
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{digits(ratio)}×"


def size(count: float) -> str:
    """A number of bytes in its unit."""
    units = ["GiB", "MiB", "KiB", "B"]
    while count >= 1023.5 and len(units) > 1:
        count /= 1024
        units.pop()
    return f"{count:g} {units[-1]}" if count == int(count) else f"{digits(count)} {units[-1]}"


def si(value: float, unit: str, number: Callable[[float], str] = "{:g}".format) -> str:
    """A value in its unit, with a prefix."""
    step = min(5, max(-2, math.floor(math.log10(value) / 3 + 1e-9)))
    return f"{number(value / 1e3**step)} {['', 'k', 'M', 'G', 'T', 'P', 'µ', 'm'][step]}{unit}"


@dataclass(frozen=True)
class Headline:
    """The case of an op and dtype that stands for it, forward + backward.

    Attributes:
        ours: the fastest of our verified backends; None where none is right.
        best: the fastest verified peer; None without one.
        right: all that count, ours first, then by time.
        all: every record of the case, whatever became of it.
    """

    op: str
    dtype: str
    case: str
    ours: Record | None
    best: Record | None
    right: list[Record]
    all: list[Record]


def headlines(records: list[Record]) -> list[Headline]:
    """Of each op and dtype the largest case, in operations and then bytes, that one of ours got right."""
    found = []
    timed = [r for r in records if r["group"] == "ops" and r["direction"] == "fwd+bwd"]
    pairs = unique((r["op"], r["dtype"]) for r in timed)
    ops = unique(op for op, _ in pairs)
    for op, dtype in sorted(pairs, key=lambda pair: ops.index(pair[0])):
        same = [r for r in timed if (r["op"], r["dtype"]) == (op, dtype)]
        own = [r for r in same if r["peer"] is None] or same
        case = max(own, key=lambda r: (right(r), r["flops"], r["bytes"]))["case"]
        every = [r for r in same if r["case"] == case]
        good = sorted(filter(right, every), key=lambda r: (r["peer"] is not None, r["seconds"], contender(r)))
        ours = next((r for r in good if r["peer"] is None), None)
        best = next((r for r in good if r["peer"] is not None), None)
        found.append(Headline(op, dtype, case, ours, best, good, every))
    return found


Cell = tuple[str, Any]  # what is read, and what is sorted by; None comes last
HEADLINE = [
    "op", "case", "dtype", "ours, ms", "share of roof", "best peer", "its ms", "ratio", "memory, ours / its",
]  # fmt: skip


def headline_cells(h: Headline, several: bool) -> list[Cell]:
    """The row of a headline under `HEADLINE`; several: say which backend of ours it was."""
    ours, best = h.ours, h.best
    own = "/".join(unique(r["status"] for r in h.all if r["peer"] is None)) or "—"
    backend = f" {ours['backend']}" if ours and several else ""
    time, share = cell(ours, "seconds", ms), cell(ours, "share_of_roof", percent)
    peaks = [cell(r, "peak_bytes", size) for r in (ours, best)]
    return [
        *((word, word) for word in (h.op, h.case, h.dtype)),
        (time[0] + backend, time[1]) if ours else (own, None),
        share,
        (contender(best), contender(best)) if best else ("—", None),
        cell(best, "seconds", ms),
        ratio_cell(best if ours else None),
        (f"{peaks[0][0]} / {peaks[1][0]}", peaks[0][1]),
    ]


def cell(record: Record | None, key: str, form: Callable[[float], str]) -> Cell:
    """A value of a record in words, or a dash."""
    value = record.get(key) if record else None
    return ("—", None) if value is None else (form(value), value)


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return digits(1e3 * seconds)


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.0f} %"


def ratio_cell(record: Record | None) -> Cell:
    """A peer's time over ours, and the interval of the rounds."""
    text, value = cell(record, "ratio", times)
    low, high = (record[key] if record else None for key in ("ratio_low", "ratio_high"))
    return text + (f" ({low:.2f}–{high:.2f})" if value and low and high else ""), value


def commit(facts: Record) -> str:
    """The commit of a run, shortened."""
    return (facts["commit"] or "unknown")[:12] + " with changes" * bool(facts["dirty"])
