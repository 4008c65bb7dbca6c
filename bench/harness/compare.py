"""Comparison of two runs: `python -m bench compare A.json B.json`.

Every ratio (a peer's time over ours) has the 10th and 90th percentile of its rounds. Two runs agree on a ratio if
these intervals overlap.
"""

from __future__ import annotations

from bench.harness.records import Record

Key = tuple[str, str, str, str, str]


def _ratios(records: list[Record]) -> dict[Key, Record]:
    return {
        (r["group"], f"{r['op']} {r['case']}", r["dtype"], r["direction"], r["peer"]): r
        for r in records
        if r["ratio"] is not None
    }


def compare(a: list[Record], b: list[Record]) -> tuple[str, float]:
    """Compare the ratios that both runs have.

    Returns:
        A table, and the share of the ratios on which the runs agree.

    Raises:
        ValueError: the runs have no ratio in common.
    """
    first, second = _ratios(a), _ratios(b)
    common = [key for key in first if key in second]
    if not common:
        raise ValueError("the two files have no case in common. Use two runs of the same benchmark.")
    agreeing = 0
    lines = []
    for key in common:
        x, y = first[key], second[key]
        agree = x["ratio_low"] <= y["ratio_high"] and y["ratio_low"] <= x["ratio_high"]
        agreeing += agree
        numbers = [f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})" for r in (x, y)]
        lines.append("  ".join([f"{' '.join(key[1:]):<72}", *numbers, "" if agree else "differ"]).rstrip())
    lines.append(f"{agreeing} of {len(common)} ratios agree within their spread")
    return "\n".join(lines), agreeing / len(common)
