"""How cost grows:  python -m bench scaling  varies one size of each op; here are the fits.

Seconds and peak bytes of each contender are fitted by c·x^p, least squares in logarithms. Theory is the same fit
of the least that must be done at the same sizes: the roof for seconds, results and gradients for bytes (for
attention p is 2 and 1 in T). A fit further off than `TOLERANCE` is flagged.
"""

from __future__ import annotations

import math
from typing import Any

from bench.harness.records import Record
from bench.report.headlines import contender

TOLERANCE = 0.25


def exponent(xs: list[float], ys: list[float]) -> float:
    """The p of the best fit of ys by c·xs^p; both positive, at least two different xs."""
    x, y = [math.log(v) for v in xs], [math.log(v) for v in ys]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def fits(records: list[Record]) -> list[dict[str, Any]]:
    """One row for each op, size, contender and quantity that was measured at three sizes or more.

    Keys: op, dtype, contender, sweep, quantity ("seconds" or "peak_bytes"), exponent, theory, departs.
    """
    series: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in records:
        if record["group"] == "scaling" and record["status"] == "ok" and record["direction"] == "fwd+bwd":
            key = (record["op"], record["dtype"], contender(record), record["sweep"])
            series.setdefault(key, []).append(record)
    rows = []
    for (op, dtype, name, letter), found in series.items():
        for quantity, least in (("seconds", "roof"), ("peak_bytes", "least_peak_bytes")):
            points = [(r["dims"][letter], r[quantity], r[least]) for r in found if r[quantity]]
            if len({x for x, *_ in points}) < 3:
                continue
            x, measured, needed = map(list, zip(*points, strict=True))
            p, theory = exponent(x, measured), exponent(x, needed)
            rows.append(
                {
                    "op": op, "dtype": dtype, "contender": name, "sweep": letter, "quantity": quantity,
                    "exponent": p, "theory": theory, "departs": abs(p - theory) > TOLERANCE,
                }
            )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The fits as a Markdown table."""
    lines = ["| op | dtype | contender | cost | grows as | theory | |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        x, flag = r["sweep"], "departs" if r["departs"] else ""
        lines.append(
            f"| {r['op']} | {r['dtype']} | {r['contender']} | {r['quantity'].replace('_', ' ')} "
            f"| {x}^{r['exponent']:.2f} | {x}^{r['theory']:.2f} | {flag} |"
        )
    return "\n".join(lines)
