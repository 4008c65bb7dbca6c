"""Results as words and numbers: Markdown tables for the README, and one HTML page with everything."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from bench.records import Record, load

K = TypeVar("K", bound=Hashable)
Theme = Mapping[str, str]

# The pages are GitHub's. Ours is vermilion; the lines of peers differ in lightness as well as in hue.
_LIGHT: Theme = {
    "paper": "#ffffff", "ink": "#1f2328", "muted": "#59636e", "grid": "#d8dee4", "peer": "#aeb8c2", "ours": "#d1440c",
    "line0": "#1f6fb8", "line1": "#0b7f6b", "line2": "#8450ad", "line3": "#8f6a00", "line4": "#3b4a5a",
    "line5": "#b0457f",
}  # fmt: skip
_DARK: Theme = {
    "paper": "#0d1117", "ink": "#f0f6fc", "muted": "#9aa4af", "grid": "#2b323b", "peer": "#566270", "ours": "#ff8142",
    "line0": "#6db3f8", "line1": "#46c4ab", "line2": "#c49af0", "line3": "#d8b24a", "line4": "#c3ccd6",
    "line5": "#f08abf",
}  # fmt: skip
THEMES = {"light": _LIGHT, "dark": _DARK}


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


PLOTS = {
    "speedup": "Our speed against the fastest verified peer, by op and dtype",
    "roofline": "Operations a second over operations a byte, under the measured roofs",
    "memory": "Peak memory of forward and backward as one size grows, by contender",
    "scaling": "Time of forward and backward as one size grows, by contender",
    "bars": "Milliseconds of forward and backward by op, dtype and contender, with the roof",
    "train": "Tokens a second of training by contender, and the losses of the same steps",
}
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

Cell = tuple[str, Any]  # what is read, and what is sorted by; None comes last
_HEADLINE = [
    "op", "case", "dtype", "ours, ms", "share of roof", "best peer", "its ms", "ratio", "memory, ours / its",
]  # fmt: skip


def _headline(h: Headline, several: bool) -> list[Cell]:
    ours, best = h.ours, h.best
    own = "/".join(unique(r["status"] for r in h.all if r["peer"] is None)) or "—"
    backend = f" {ours['backend']}" if ours and several else ""
    time, share = _cell(ours, "seconds", _ms), _cell(ours, "share_of_roof", _percent)
    peaks = [_cell(r, "peak_bytes", size) for r in (ours, best)]
    return [
        *((word, word) for word in (h.op, h.case, h.dtype)),
        (time[0] + backend, time[1]) if ours else (own, None),
        share,
        (contender(best), contender(best)) if best else ("—", None),
        _cell(best, "seconds", _ms),
        _ratio(best if ours else None),
        (f"{peaks[0][0]} / {peaks[1][0]}", peaks[0][1]),
    ]


def _cell(record: Record | None, key: str, form: Callable[[float], str]) -> Cell:
    value = record.get(key) if record else None
    return ("—", None) if value is None else (form(value), value)


def _ms(seconds: float) -> str:
    return digits(1e3 * seconds)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _ratio(record: Record | None) -> Cell:
    """A peer's time over ours, and the interval of the rounds."""
    text, value = _cell(record, "ratio", times)
    low, high = (record[key] if record else None for key in ("ratio_low", "ratio_high"))
    return text + (f" ({low:.2f}–{high:.2f})" if value and low and high else ""), value


def tables(records: list[Record]) -> str:
    """The headline as a Markdown table, one row an op and dtype, and below it what of ours was not right."""
    several = len({r["backend"] for r in records if r["peer"] is None}) > 1
    rows = [[text for text, _ in _headline(h, several)] for h in headlines(records)]
    rule = ["---"] * 3 + ["---:"] * 2 + ["---"] + ["---:"] * 3
    rows = [_HEADLINE, rule, *([*map(_markdown, row)] for row in rows)]
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
        about = f"torch {facts['torch']}, commit {_commit(facts)}, {facts['threads']} threads, heap: {facts['heap']}."
        trial = " A rehearsal: its numbers say nothing." if facts["rehearsal"] else ""
        about = f"**{_markdown(facts['device'])}**: {_markdown(about)}{trial} Forward + backward, medians:"
        parts.append(about)
        parts.append(tables(records))
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
    from bench import plots

    records = load(results_json)
    writers = (plots.speedup, plots.roofline, plots.memory, plots.scaling, plots.bars, plots.train)
    written = [path for write in writers for path in write(records, out / "plots")]
    drawn = (path for name in PLOTS for path in (out / "plots").glob(f"{name}-*.*g"))
    for old in (path for path in drawn if path not in written):
        old.unlink()  # of an earlier run that had more to show
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    page.write_text(html(records), encoding="utf-8")
    return [*written, page]


def html(records: list[Record]) -> str:
    """Everything as one page that needs nothing else: facts, plots, and a table for every case."""
    facts = records[0]
    several = len({r["backend"] for r in records if r["peer"] is None}) > 1
    sections: list[tuple[str, str]] = []
    cases = [("" if h.ours else "off", _headline(h, several)) for h in headlines(records)]
    if cases:
        about = "<p>The largest case of each op that one of ours got right, forward + backward.</p>"
        sections.append(("Headline", about + _table("Headline", _HEADLINE, cases)))
    pictures = "".join(filter(None, (_inline(name, records) for name in PLOTS)))
    if pictures:
        sections.append(("Plots", f'<div class="plots">{pictures}</div>'))
    groups: dict[str, dict[str, list[Record]]] = {}
    for r in records:
        title = f"{r['op']}, {r['case']}" if r["group"] in ("ops", "train") else r["op"]
        title += f", over {r['sweep']}" if "sweep" in r else ""
        groups.setdefault(r["group"], {}).setdefault(title, []).append(r)
    for group, name in (("ops", "Ops"), ("train", "Training"), ("scaling", "Scaling"), ("roof", "Roofs")):
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
    said["commit"] = _commit(facts)
    rows = (f"<div><dt>{k.replace('_', ' ')}</dt><dd>{escape(str(v))}</dd></div>" for k, v in said.items())
    return f"<dl>{''.join(rows)}</dl>"


def _commit(facts: Record) -> str:
    return (facts["commit"] or "unknown")[:12] + " with changes" * bool(facts["dirty"])


def _contenders(caption: str, records: list[Record]) -> str:
    """A table with a row for each contender, dtype and case, whatever became of it; the fastest first."""
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        rows.setdefault((r["case"], r["dtype"], contender(r)), {})[r["direction"]] = r
    directions = unique(r["direction"] for r in records)
    order_of = unique(word for r in records for word in (r["case"], r["dtype"]))
    cases, train = len({r["case"] for r in records}) > 1, any("tokens_per_second" in r for r in records)
    throughput = {"tokens/s": ("tokens_per_second", digits), "MFU, measured peak": ("mfu_measured", _percent),
                  "MFU, datasheet": ("mfu_datasheet", _percent)} if train else {}  # fmt: skip
    names = [*["case"] * cases, "contender", "dtype", *(f"{d}, ms" for d in directions), *throughput, "rate"]
    names += ["spread", "ratio", "share of roof", "peak memory", "error / allowed", "status"]
    lines: list[tuple[Any, str, list[Cell]]] = []
    for (case, dtype, name), found in rows.items():
        main = next(found[d] for d in ("step", "fwd+bwd", *found) if d in found)
        bad = "; ".join(unique(f"{r['status']}: {r['reason']}" for r in found.values() if not right(r)))
        kind = "off" if bad else "ours" if main["peer"] is None else ""
        cells: list[Cell] = [*[(case, case)] * cases, (name, name), (dtype, dtype)]
        if any(r["seconds"] for r in found.values()):
            cells += [_cell(found.get(d), "seconds", _ms) for d in directions]
            cells += [_cell(main, *column) for column in throughput.values()]
            cells.append(_rate(main) if main["group"] == "roof" else ("—", None))
            share, bound = _cell(main, "share_of_roof", _percent), main["bound"] or ""
            cells += [_cell(main, "spread", _percent), _ratio(main), (f"{share[0]} {bound}", share[1])]
            cells += [_cell(main, "peak_bytes", size), _cell(main, "error", digits)]
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
    from bench.scaling import fits

    names = ["op", "dtype", "contender", "size", "quantity", "exponent", "theory", "verdict"]
    rows = []
    for r in fits(records):
        words = [r["op"], r["dtype"], r["contender"], r["sweep"], r["quantity"].replace("_", " ")]
        verdict = "departs from theory" if r["departs"] else "as theory"
        numbers = [(f"{r['exponent']:.2f}", r["exponent"]), (f"{r['theory']:g}", r["theory"])]
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
    from bench import plots

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
