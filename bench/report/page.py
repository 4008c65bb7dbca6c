"""The HTML report: one file with the tables and plots of one or more runs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from html import escape

from bench.harness.records import Record, contender
from bench.harness.scaling import COLUMNS as FIT_COLUMNS
from bench.harness.scaling import fits, rows
from bench.report.headlines import (
    HEADLINE,
    cell,
    commit,
    format_bytes,
    format_ms,
    format_number,
    format_percent,
    format_rate,
    headline_rows,
    ratio_cell,
)
from bench.report.plots import PLOTS, svg

GROUPS = {
    "ops": "Ops", "train": "Training", "generate": "Generation", "scaling": "Scaling", "roofline": "Roofline bounds",
}  # fmt: skip
COLUMNS: dict[str, Callable[[Record], str]] = {
    "op": lambda r: r["op"],
    "case": lambda r: r["case"],
    "dtype": lambda r: r["dtype"],
    "direction": lambda r: r["direction"],
    "contender": contender,
    "ms": lambda r: cell(r, "seconds", format_ms),
    "spread": lambda r: cell(r, "spread", format_percent),
    "speedup": ratio_cell,
    "of roofline": lambda r: cell(r, "share_of_roofline", format_percent),
    "bound": lambda r: cell(r, "bound"),
    "tokens/s": lambda r: cell(r, "tokens_per_second", "{:,.0f}".format),
    "MFU": lambda r: cell(r, "mfu_measured", format_percent),
    "MFU, datasheet": lambda r: cell(r, "mfu_datasheet", format_percent),
    "peak memory": lambda r: cell(r, "peak_bytes", format_bytes),
    "error / allowed": lambda r: cell(r, "error", format_number),
    "status": lambda r: r["status"] + (f": {r['reason']}" if r["reason"] else ""),
}
OURS = ' class="ours"'
FACTS = ("torch", "triton", "date", "command", "python", "threads", "driver", "cuda", "cudnn", "clocks")
CSS = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: auto; padding: 1rem }
div { overflow-x: auto }
img { max-width: 100%; vertical-align: top }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #8886; padding: 2px 8px; text-align: left; white-space: nowrap }
td:last-child { white-space: normal }
.ours td { font-weight: 600 }
"""


def html(runs: list[list[Record]]) -> str:
    """Render runs as one HTML page, which is also well-formed XML and refers to no other file."""
    body = "".join(map(_run, runs))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>fastgpt benchmarks</title>'
        f"<style>{CSS}</style></head><body><h1>fastgpt benchmarks</h1>{body}</body></html>\n"
    )


def _run(records: list[Record]) -> str:
    facts = records[0]
    words = [
        f"commit {commit(facts)}",
        facts["malloc"],
        *(f"{key} {facts[key]}" for key in FACTS if facts[key]),
    ]
    parts = [f"<h2>{escape(facts['device'])}</h2><p>{escape('; '.join(words))}</p>"]
    if facts["rehearsal"]:
        parts.append("<p><strong>A rehearsal at toy sizes: the times have no meaning.</strong></p>")
    if found := headline_rows(records):
        parts.append("<h3>Largest case of each op, forward + backward</h3>" + _table(HEADLINE, found))
    for name, alt in PLOTS.items():
        if picture := svg(name, records):
            data = b64encode(picture.encode()).decode()
            parts.append(f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}"/>')
    if fitted := rows(fits(records)):
        parts.append("<h3>Fitted exponents</h3>" + _table(FIT_COLUMNS, fitted))
    for group, title in GROUPS.items():
        if some := [r for r in records if r["group"] == group]:
            parts.append(f"<h3>{title}</h3>" + _records(some))
    return "\n".join(parts)


def _records(records: list[Record]) -> str:
    """Render a row for each record, without the columns that are empty in all of them."""
    columns = {name: [form(r) for r in records] for name, form in COLUMNS.items()}
    if records[0]["group"] == "roofline":
        bound = {"copy": ("bytes", "B/s"), "matmul": ("flops", "FLOP/s")}
        keys = [(r, *bound[r["direction"]]) for r in records]
        columns["rate"] = [format_rate(r[quantity] / r["seconds"], unit) for r, quantity, unit in keys]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"—"}}
    ours = [r["peer"] is None for r in records]
    return _table(tuple(columns), list(map(list, zip(*columns.values(), strict=True))), ours)


def _table(names: tuple[str, ...], cells: list[list[str]], ours: list[bool] | None = None) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr{OURS * own}>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>\n"
        for line, own in zip(cells, ours or [False] * len(cells), strict=True)
    )
    return f"<div><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
