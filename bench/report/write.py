"""Results as words: Markdown tables for the README, and what `python -m bench report` writes."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from urllib.parse import quote

from bench.harness.records import Record, load
from bench.report import page, plots
from bench.report.headlines import HEADLINE, commit, contender, headline_cells, headlines, unique
from bench.report.plots import PLOTS

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def tables(records: list[Record]) -> str:
    """The headline as a Markdown table, one row an op and dtype, and below it what of ours was not right."""
    several = len({r["backend"] for r in records if r["peer"] is None}) > 1
    rows = [[text for text, _ in headline_cells(h, several)] for h in headlines(records)]
    rule = ["---"] * 3 + ["---:"] * 2 + ["---"] + ["---:"] * 3
    rows = [HEADLINE, rule, *([*map(_markdown, row)] for row in rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows] if len(rows) > 2 else []
    bad = (r for r in records if r["peer"] is None and r["status"] != "ok")
    said = (f"{r['status']}: {contender(r)}, {r['op']} {r['case']} {r['dtype']}: {r['reason']}" for r in bad)
    return "\n".join([*lines, *("\n" + _markdown(text[0].upper() + text[1:]) for text in unique(said))])


def _markdown(text: str) -> str:
    return escape(text, quote=False).replace("|", "&#124;")


def readme_block(results_dir: Path) -> str:
    """What the README says of the results: for each device its facts, the headline and the plots."""
    parts, gpu = [], False
    for path in sorted(results_dir.glob("*/results.json")):
        records = load(path)
        facts = records[0]
        gpu |= facts["cuda"] is not None and not facts["rehearsal"]
        about = f"torch {facts['torch']}, commit {commit(facts)}, {facts['threads']} threads, heap: {facts['heap']}."
        trial = " A rehearsal: its numbers say nothing." if facts["rehearsal"] else ""
        table = tables(records)
        what = "forward + backward" if table else "whole steps"
        how = f"`{re.sub(r' --out [^ ]+', '', facts['command'])}`, {what}, medians:"
        about = f"**{_markdown(facts['device'])}**: {_markdown(about)}{trial} {how}"
        parts.append(about)
        parts.append(table)
        shown = [name for name in PLOTS if (path.parent / "plots" / f"{name}-light.svg").exists()]
        parts.append("\n".join(_picture(path.parent.name, name, facts["device"]) for name in shown))
    parts += [] if gpu else ["Nothing is measured on a GPU yet."]
    return "\n\n".join(filter(None, parts))


def _picture(folder: str, name: str, device: str) -> str:
    path = f"bench/results/{quote(folder)}/plots/{name}"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{path}-dark.svg">'
        f'<img src="{path}-light.svg" align="top" width="49%" alt="{escape(f"{PLOTS[name]}; {device}")}"></picture>'
    )


def update_readme(readme: Path, results_dir: Path) -> bool:
    """Put the block between the README's markers; whether that changed anything.

    Raises ValueError where a marker is missing.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no {BEGIN} followed by {END}: put both where the results belong")
    new = f"{before}{BEGIN}\n{readme_block(results_dir)}\n{END}{after}"
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def write_report(results_json: Path, out: Path) -> list[Path]:
    """Write report.html and plots/ of a result file into a folder; the files written."""
    records = load(results_json)
    written = [path for name in PLOTS for path in getattr(plots, name)(records, out / "plots")]
    drawn = (path for name in PLOTS for path in (out / "plots").glob(f"{name}-*.*g"))
    for old in (path for path in drawn if path not in written):
        old.unlink()  # of an earlier run that had more to show
    out.mkdir(parents=True, exist_ok=True)
    report = out / "report.html"
    report.write_text(page.html(records), encoding="utf-8")
    return [*written, report]
