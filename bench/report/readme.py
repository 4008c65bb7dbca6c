"""Markdown tables of results, and the benchmark section of README.md."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from bench.harness.records import Record, contender, load
from bench.report.headlines import HEADLINE, commit, headline_rows, unique
from bench.report.plots import PLOTS, svg

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
TEXT_COLUMNS = ("op", "case", "dtype", "fastest peer")
SHOWN = ("speedup", "training")  # the plots in README


def markdown_table(names: Sequence[str], rows: list[list[str]], left: Collection[str]) -> str:
    """Format a Markdown table; the columns `left` are aligned to the left, the others to the right."""
    rules = ["---" if name in left else "---:" for name in names]
    lines = [names, rules, *([*map(_markdown, row)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(records: list[Record]) -> str:
    """Format the headlines as a Markdown table, followed by the failures of our own backends."""
    rows = headline_rows(records)
    bad = (r for r in records if r["peer"] is None and r["status"] != "ok")
    said = (f"{r['status']}: {contender(r)}, {r['op']} {r['case']} {r['dtype']}: {r['reason']}" for r in bad)
    failures = ("\n" + _markdown(text[0].upper() + text[1:]) for text in unique(said))
    return "\n".join([*([markdown_table(HEADLINE, rows, TEXT_COLUMNS)] if rows else []), *failures])


def _markdown(text: str) -> str:
    return escape(text, quote=False).replace("|", "&#124;")


def readme_block(results_dir: Path) -> str:
    """Format README's section: for each device the machine, the headlines and the plots `SHOWN`."""
    parts, gpu = [], False
    for path in sorted(results_dir.glob("*/results.json")):
        records = load(path)
        facts = records[0]
        gpu |= facts["cuda"] is not None and not facts["rehearsal"]
        machine = (
            f"torch {facts['torch']}, commit {commit(facts)}, {facts['threads']} threads, {facts['malloc']}."
        )
        rehearsal = " A rehearsal: the times have no meaning." if facts["rehearsal"] else ""
        table = tables(records)
        what = "forward + backward" if table else "whole steps"
        how = f"`{re.sub(r' --out [^ ]+', '', facts['command'])}`, {what}, medians:"
        parts.append(f"**{_markdown(facts['device'])}**: {_markdown(machine)}{rehearsal} {how}")
        parts.append(table)
        shown = [name for name in SHOWN if (path.parent / f"{name}.svg").exists()]
        parts.append("\n".join(_image(path.parent.name, name, facts["device"]) for name in shown))
    parts += [] if gpu else ["Nothing is measured on a GPU yet."]
    return "\n\n".join(filter(None, parts))


def _image(folder: str, name: str, device: str) -> str:
    path = f"bench/results/{quote(folder)}/{name}.svg"
    return f'<img src="{path}" align="top" width="49%" alt="{escape(f"{PLOTS[name]}; {device}")}">'


def update_readme(readme: Path, results_dir: Path) -> bool:
    """Replace the text between the markers of README.

    Returns:
        True if README has changed.

    Raises:
        ValueError: a marker is missing.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no {BEGIN} followed by {END}. Add both where the results belong.")
    new = f"{before}{BEGIN}\n{readme_block(results_dir)}\n{END}{after}"
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def write_plots(results_json: Path) -> list[Path]:
    """Write the plots `SHOWN` next to a result file, and delete those without data; return the files written."""
    records = load(results_json)
    written = []
    for name in SHOWN:
        path, picture = results_json.with_name(f"{name}.svg"), svg(name, records)
        if picture is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(picture, encoding="utf-8")
            written.append(path)
    return written
