"""The HTML report: one page with everything, which needs nothing else."""

from __future__ import annotations

import json
import math
import re
from html import escape
from typing import Any

from bench.harness.records import Record
from bench.report import plots
from bench.report.headlines import (
    HEADLINE,
    Cell,
    cell,
    commit,
    contender,
    digits,
    headline_cells,
    headlines,
    ms,
    percent,
    ratio_cell,
    right,
    si,
    size,
    unique,
)
from bench.report.plots import PLOTS
from bench.report.scaling import fits
from bench.report.sheet import THEMES


def html(records: list[Record]) -> str:
    """Everything as one page that needs nothing else: facts, plots, and a table for every case."""
    facts = records[0]
    several = len({r["backend"] for r in records if r["peer"] is None}) > 1
    sections: list[tuple[str, str]] = []
    cases = [("" if h.ours else "off", headline_cells(h, several)) for h in headlines(records)]
    if cases:
        about = "<p>The largest case of each op that one of ours got right, forward + backward.</p>"
        sections.append(("Headline", about + _table("Headline", HEADLINE, cases)))
    pictures = "".join(filter(None, (_inline(name, records) for name in PLOTS)))
    if pictures:
        sections.append(("Plots", f'<div class="plots">{pictures}</div>'))
    groups: dict[str, dict[str, list[Record]]] = {}
    for r in records:
        title = f"{r['op']}, {r['case']}" if r["group"] in ("ops", "train", "generate") else r["op"]
        title += f", over {r['sweep']}" if "sweep" in r else ""
        groups.setdefault(r["group"], {}).setdefault(title, []).append(r)
    for group, name in (
        ("ops", "Ops"),
        ("train", "Training"),
        ("generate", "Generation"),
        ("scaling", "Scaling"),
        ("roof", "Roofs"),
    ):
        found = groups.get(group, {}).items()
        body = "".join(f"<h3>{escape(t)}</h3>{_contenders(t, rows)}" for t, rows in found)
        if body:
            sections.append((name, (_fits(records) if group == "scaling" else "") + body))
    nav = "".join(f'<a href="#{name.lower()}">{name}</a>' for name, _ in sections)
    main = "".join(f'<section id="{name.lower()}"><h2>{name}</h2>{body}</section>' for name, body in sections)
    pairs = ((role, THEMES["light"][role], THEMES["dark"][role]) for role in THEMES["light"])
    colours = ";".join(f"--{role}:light-dark({light},{dark})" for role, light, dark in pairs)
    trial = "<p><strong>A rehearsal: these numbers say nothing.</strong></p>" if facts["rehearsal"] else ""
    title = f"fastgpt benchmarks: {escape(facts['device'])}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>:root{{{colours}}}{_CSS}</style>'
        f'</head><body><header><h1>fastgpt benchmarks</h1><button type="button" id="theme" hidden>Theme</button>'
        f'<nav aria-label="Sections">{nav}</nav></header><main>{trial}{_facts(facts)}{main}</main>'
        f"<script>{_JS}</script></body></html>\n"
    )


def _facts(facts: Record) -> str:
    known = ("device", "torch", "triton", "commit", "date", "command", "python", "threads", "heap", "driver", "cuda",
             "cudnn", "clocks", "packages", "datasheet_flops")  # fmt: skip
    said = {key: facts[key] for key in known if facts[key]}
    for key in {"packages", "datasheet_flops"} & set(said):
        said[key] = ", ".join(f"{k} {v}" for k, v in said[key].items() if v)
    said["commit"] = commit(facts)
    rows = (f"<div><dt>{k.replace('_', ' ')}</dt><dd>{escape(str(v))}</dd></div>" for k, v in said.items())
    return f"<dl>{''.join(rows)}</dl>"


def _contenders(caption: str, records: list[Record]) -> str:
    """A table with a row for each contender, dtype and case, whatever became of it; the fastest first."""
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        rows.setdefault((r["case"], r["dtype"], contender(r)), {})[r["direction"]] = r
    directions = unique(r["direction"] for r in records)
    order_of = unique(word for r in records for word in (r["case"], r["dtype"]))
    cases, train = len({r["case"] for r in records}) > 1, any("tokens_per_second" in r for r in records)
    throughput = {"tokens/s": ("tokens_per_second", digits), "MFU, measured peak": ("mfu_measured", percent),
                  "MFU, datasheet": ("mfu_datasheet", percent)} if train else {}  # fmt: skip
    names = [*["case"] * cases, "contender", "dtype", *(f"{d}, ms" for d in directions), *throughput, "rate"]
    names += ["spread", "ratio", "share of roof", "peak memory", "error / allowed", "status"]
    lines: list[tuple[Any, str, list[Cell]]] = []
    for (case, dtype, name), found in rows.items():
        main = next(found[d] for d in ("step", "fwd+bwd", *found) if d in found)
        bad = "; ".join(unique(f"{r['status']}: {r['reason']}" for r in found.values() if not right(r)))
        kind = "off" if bad else "ours" if main["peer"] is None else ""
        cells: list[Cell] = [*[(case, case)] * cases, (name, name), (dtype, dtype)]
        if any(r["seconds"] for r in found.values()):
            cells += [cell(found.get(d), "seconds", ms) for d in directions]
            cells += [cell(main, *column) for column in throughput.values()]
            cells.append(_rate(main) if main["group"] == "roof" else ("—", None))
            share, bound = cell(main, "share_of_roof", percent), main["bound"] or ""
            cells += [cell(main, "spread", percent), ratio_cell(main), (f"{share[0]} {bound}", share[1])]
            cells += [cell(main, "peak_bytes", size), cell(main, "error", digits)]
        elif main["error"] is not None:
            bad += f" (error / allowed: {digits(main['error'])})"
        order = order_of.index(case), order_of.index(dtype), bool(bad), kind != "ours", main["seconds"] or 0
        lines.append((order, kind, [*cells, (bad or "ok", bad or "ok")]))
    lines.sort(key=lambda line: line[0])
    return _table(caption, names, [line[1:] for line in lines])


def _rate(roof: Record) -> Cell:
    quantity, unit = ("bytes", "B/s") if roof["direction"] == "copy" else ("flops", "FLOP/s")
    rate = roof[quantity] / roof["seconds"]
    return si(rate, unit, digits), rate


def _fits(records: list[Record]) -> str:
    names = ["op", "dtype", "contender", "size", "quantity", "exponent", "theory", "verdict"]
    rows = []
    for r in fits(records):
        words = [r["op"], r["dtype"], r["contender"], r["sweep"], r["quantity"].replace("_", " ")]
        verdict = "departs from theory" if r["departs"] else "as theory"
        numbers = [(f"{r['exponent']:.2f}", r["exponent"]), (f"{r['theory']:.2f}", r["theory"])]
        kind = "ours" if r["contender"].startswith("fastgpt ") else ""
        rows.append((kind, [*((word, word) for word in words), *numbers, (verdict, verdict)]))
    return "<h3>Fitted exponents</h3>" + _table("Fitted exponents", names, rows) if rows else ""


def _table(caption: str, names: list[str], rows: list[tuple[str, list[Cell]]]) -> str:
    """A table that can be sorted by any column, in a box that scrolls by itself; columns that say nothing are left out.

    The last cell of a row that has fewer than there are columns takes the room of the others.
    """
    told = {i for _, cells in rows for i, (_, value) in enumerate(cells[:-1]) if value is not None}
    rows = [(row, [c for i, c in enumerate(cells[:-1]) if i in told] + cells[-1:]) for row, cells in rows]
    names = [name for i, name in enumerate(names[:-1]) if i in told] + names[-1:]
    numeric = {
        i for _, cells in rows for i, (_, value) in enumerate(cells) if not isinstance(value, str | None)
    }
    kinds = [' class="n"' if i in numeric else "" for i in range(len(names))]
    button = '<th{} scope="col" aria-sort="none"><button type="button">{}</button></th>'
    head = "".join(button.format(kind, escape(name)) for kind, name in zip(kinds, names, strict=True))
    body = []
    for row, cells in rows:
        more = len(names) - len(cells)
        line = "".join(
            f"<td{kind}>{escape(text)}</td>" for kind, (text, _) in zip(kinds, cells[:-1], strict=False)
        )
        line += f'<td colspan="{more + 1}"{"" if more else kinds[-1]}>{escape(cells[-1][0])}</td>'
        values = [None if isinstance(v, float) and not math.isfinite(v) else v for _, v in cells]
        values[-1:-1] = [None] * more
        body.append(f'<tr class="{row}" data-v="{escape(json.dumps(values))}">{line}</tr>')
    label = escape(caption)
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _inline(name: str, records: list[Record]) -> str:
    """A plot as part of the page: its colours are the page's, and its ids its own."""
    picture = plots.svg(name, records, THEMES["light"])
    if picture is None:
        return ""
    for role, colour in THEMES["light"].items():
        picture = picture.replace(colour, f"var(--{role})")
    own_id = r'\bid="|(?<=href=")#|(?<=url\()#'
    picture = re.sub(own_id, lambda m: f"{m[0]}{name}-", picture[picture.index("<svg") :])
    label = f'<svg role="img" aria-label="{escape(PLOTS[name])}"'
    tag, rest = picture.split(">", 1)
    tag = re.sub(r'\s(xmlns(:xlink)?|width|height|version)="[^"]*"', "", tag).replace("<svg", label)
    return f"<figure>{tag}>{rest.replace('xlink:href', 'href')}</figure>"


_CSS = """
:root{color-scheme:light dark}
:root[data-theme=light]{color-scheme:light}:root[data-theme=dark]{color-scheme:dark}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header{display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:center;border-bottom:1px solid var(--grid)}
header,main{max-width:1240px;margin:auto;padding:1rem clamp(.8rem,3vw,2rem)}
h1{font-size:1.4rem;margin:0;flex:1}h2{font-size:1.25rem;margin:2.6rem 0 .6rem}h3{font-size:1rem;margin:1.6rem 0 .4rem}
h3,dd{overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;width:100%}a{color:inherit;text-underline-offset:.2em}
p,dt,.off td{color:var(--muted)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(10rem,1fr));gap:.5rem 1.2rem;font-size:.875rem}
dt{font-size:.75rem}dd{margin:0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem;align-items:start}
figure{margin:0;border:1px solid var(--grid);border-radius:8px;overflow:hidden}figure svg{display:block;width:100%}
.box{overflow-x:auto;border:1px solid var(--grid);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.8125rem;font-variant-numeric:tabular-nums}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:.35rem .55rem;text-align:left;white-space:nowrap}
td{border-top:1px solid var(--grid)}.n{text-align:right}
td:last-child:not(.n){white-space:normal;overflow-wrap:anywhere;min-width:9rem}
.ours td{background:color-mix(in srgb,var(--ours) 10%,transparent)}
.ours td:first-child{box-shadow:inset 3px 0 var(--ours);font-weight:600}
button{font:inherit;color:inherit;background:none;cursor:pointer;border:1px solid var(--grid);border-radius:6px}
#theme{padding:.2rem .7rem}
th button{border:0;padding:0;font-weight:600;text-decoration:underline dotted var(--muted);text-underline-offset:.25em}
th[aria-sort=ascending] button::after{content:" ↑"}th[aria-sort=descending] button::after{content:" ↓"}
:focus-visible{outline:2px solid var(--ours);outline-offset:2px}
"""

_JS = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const th = button.parentElement, table = th.closest("table"), body = table.tBodies[0];
  const sign = th.ariaSort === "ascending" ? -1 : 1;
  for (const other of table.querySelectorAll("th")) other.setAttribute("aria-sort", "none");
  th.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const key = row => JSON.parse(row.dataset.v)[th.cellIndex];
  const order = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true});
  body.append(...[...body.rows].sort((p, q) => {
    const a = key(p), b = key(q);
    return a === null || b === null ? (a === null) - (b === null) : sign * order(a, b);
  }));
});
const root = document.documentElement, toggle = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
const show = () => { toggle.textContent = isDark() ? "Light theme" : "Dark theme"; };
toggle.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; show(); });
system.addEventListener("change", show);
toggle.hidden = false;
show();
"""
