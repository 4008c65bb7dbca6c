"""Markdown tables of results: training steps in README.md, ops in docs/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from bench.harness.records import Record, contender, is_timed, load
from bench.report.headlines import (
    HEADLINE,
    cell,
    commit,
    format_ms,
    format_percent,
    format_ratio,
    headline_rows,
    unique,
)
from bench.report.plots import PLOTS, svg

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
TEXT_COLUMNS = ("op", "case", "dtype", "fastest peer")
STEPS = ("training step", "dtype", "fastgpt", "PyTorch", "torch.compile", "memory, of PyTorch's")
SHOWN = ("speedup", "training")  # the plots in bench/results


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


def steps_table(records: list[Record]) -> str:
    """Format whole training steps as a Markdown table, or "" without any: a peer's time over ours in parentheses."""
    rows = []
    steps = [r for r in records if r["op"] in ("train", "accelerate")]
    for key in unique((r["op"], r["case"], r["dtype"]) for r in steps):
        case = {contender(r): r for r in steps if (r["op"], r["case"], r["dtype"]) == key and is_timed(r)}
        ours = min((r for r in case.values() if r["peer"] is None), key=lambda r: r["seconds"], default=None)
        plain = case.get("PyTorch") or case.get("unmodified")
        if ours is None:
            continue
        peers = [
            cell(peer, "seconds", format_ms) + (f" ms ({cell(peer, 'ratio', format_ratio)})" if peer else "")
            for peer in (plain, case.get("torch.compile"))
        ]
        known = plain and plain["peak_bytes"] and ours["peak_bytes"]
        memory = format_percent(ours["peak_bytes"] / plain["peak_bytes"]) if known and plain else "—"
        rows.append([_step(ours), ours["dtype"], f"{format_ms(ours['seconds'])} ms", *peers, memory])
    return markdown_table(STEPS, rows, STEPS[:2]) if rows else ""


def _step(record: Record) -> str:
    """Describe a training step: the model, its size, and a batch."""
    size = record["dims"]
    name = "`fastgpt.model.GPT`" if record["op"] == "train" else f"{record['case'].split()[0]}, accelerated"
    return f"{name}: {size['L']} × {size['C']}, vocabulary {size['V']:,}, {size['B']} × {size['T']} tokens"


def block(results_dir: Path, *, ops: bool, root: str) -> str:
    """Format a section: for each device the machine, a table and a plot.

    Args:
        results_dir: `bench/results`.
        ops: whether the ops are shown, or whole training steps.
        root: path of the repository's root as the page sees it, such as "../".
    """
    parts, gpu = [], False
    for path in sorted(results_dir.glob("*/results.json")):
        records = load(path)
        facts = records[0]
        gpu |= facts["cuda"] is not None and not facts["rehearsal"]
        table = tables(records) if ops else steps_table(records)
        machine = (
            f"torch {facts['torch']}, commit {commit(facts)}, {facts['threads']} threads, {facts['malloc']}."
        )
        rehearsal = " A rehearsal: the times have no meaning." if facts["rehearsal"] else ""
        what = "forward + backward" if ops else "forward, backward and AdamW"
        how = f"`{re.sub(r' --out [^ ]+', '', facts['command'])}`, {what}, medians:"
        image = path.with_name(f"{SHOWN[0] if ops else SHOWN[1]}.svg")
        if table or image.exists():
            parts.append(f"**{_markdown(facts['device'])}**: {_markdown(machine)}{rehearsal} {how}")
            parts += [table, _image(root, image, facts["device"]) if image.exists() else ""]
    parts += [] if gpu else ["Nothing is measured on a GPU yet."]
    return "\n\n".join(filter(None, parts))


def _image(root: str, path: Path, device: str) -> str:
    source = f"{root}bench/results/{quote(path.parent.name)}/{path.name}"
    return f'<img src="{source}" width="75%" alt="{escape(f"{PLOTS[path.stem]}; {device}")}">'


def update(page: Path, text_of_block: str) -> bool:
    """Replace the text between the markers of a page.

    Returns:
        True if the page has changed.

    Raises:
        ValueError: a marker is missing.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} followed by {END}. Add both where the results belong.")
    new = f"{before}{BEGIN}\n{text_of_block}\n{END}{after}"
    if new != text:
        page.write_text(new, encoding="utf-8")
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
