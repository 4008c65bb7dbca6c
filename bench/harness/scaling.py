"""Fits of the scaling series: `python -m bench scaling` varies one size of each op.

The seconds and the peak bytes of each contender are fitted by c·x^p, with least squares of the logarithms. The
expected exponent is the same fit of the lower bound at the same sizes: the roofline bound for seconds, the bytes of
results and gradients for memory. For attention they are 2 and 1 in T. A difference of more than `TOLERANCE` is marked.
"""

from __future__ import annotations

import math
from typing import Any

from bench.harness.records import Record, contender

TOLERANCE = 0.25
COLUMNS = ("op", "dtype", "contender", "quantity", "fit", "expected", "")


def exponent(xs: list[float], ys: list[float]) -> float:
    """Return the p of the best fit of ys by c·xs^p; all values positive, at least two different xs."""
    x, y = [math.log(v) for v in xs], [math.log(v) for v in ys]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def fits(records: list[Record]) -> list[dict[str, Any]]:
    """Fit each op, size, contender and quantity that was measured at three sizes or more.

    Returns:
        Dictionaries with the keys op, dtype, contender, sweep, quantity ("seconds" or "peak_bytes"), exponent,
        expected, differs.
    """
    series: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in records:
        if record["group"] == "scaling" and record["status"] == "ok" and record["direction"] == "fwd+bwd":
            key = (record["op"], record["dtype"], contender(record), record["sweep"])
            series.setdefault(key, []).append(record)
    found = []
    for (op, dtype, name, letter), same in series.items():
        for quantity, bound in (("seconds", "roofline_seconds"), ("peak_bytes", "min_peak_bytes")):
            points = [(r["dims"][letter], r[quantity], r[bound]) for r in same if r[quantity]]
            if len({x for x, *_ in points}) < 3:
                continue
            x, measured, least = map(list, zip(*points, strict=True))
            p, expected = exponent(x, measured), exponent(x, least)
            found.append(
                {
                    "op": op, "dtype": dtype, "contender": name, "sweep": letter, "quantity": quantity,
                    "exponent": p, "expected": expected, "differs": abs(p - expected) > TOLERANCE,
                }
            )  # fmt: skip
    return found


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """Format fits as rows of the columns `COLUMNS`."""
    return [
        [
            *(f["op"], f["dtype"], f["contender"], f["quantity"].replace("_", " ")),
            *(f"{f['sweep']}^{f[key]:.2f}" for key in ("exponent", "expected")),
            "differs" if f["differs"] else "",
        ]
        for f in found
    ]
