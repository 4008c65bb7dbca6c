"""Pictures of benchmark results: each as SVG and PNG, for a light page and for a dark one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness.records import Record
from bench.report.headlines import Headline, contender, digits, headlines, right, si, size, times, unique
from bench.report.sheet import (
    BODY,
    EDGE,
    MARGIN,
    SMALL,
    THEMES,
    WIDTH,
    Sheet,
    Spot,
    Theme,
    cut,
    logarithmic,
    powers,
    stacked,
    wide,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[list[Record], Theme], "Figure | None"]

LONGEST = 8  # bars are cut at so many times the shortest, so that one contender does not flatten the others
DIMENSIONS = {"N": "rows N", "T": "length T", "V": "vocabulary V", "B": "batch B"}

PLOTS = {
    "speedup": "Our speed against the fastest verified peer, by op and dtype",
    "roofline": "Operations a second over operations a byte, under the measured roofs",
    "memory": "Peak memory of forward and backward as one size grows, by contender",
    "scaling": "Time of forward and backward as one size grows, by contender",
    "bars": "Milliseconds of forward and backward by op, dtype and contender, with the roof",
    "train": "Tokens a second of training by contender, and the losses of the same steps",
    "accelerate": "Tokens a second and peak memory of training models of transformers, accelerated and not",
}

_drawings: dict[str, Draw] = {}


def svg(name: str, records: list[Record], theme: Theme) -> str | None:
    """A plot by name as the text of an SVG file; None where there are no data for it."""
    figure = _drawings[name](records, theme)
    return None if figure is None else _file(figure, name, "svg").decode()


def _plot(draw: Draw) -> Callable[[list[Record], Path], list[Path]]:
    """Make of a drawing a function that writes it in both themes and kinds, and returns the files written."""
    name = draw.__name__
    _drawings[name] = draw

    def write(records: list[Record], out: Path) -> list[Path]:
        written = []
        for mode, theme in THEMES.items():
            figure = draw(records, theme)
            for kind in ("svg", "png") if figure else ():
                out.mkdir(parents=True, exist_ok=True)
                written.append(out / f"{name}-{mode}.{kind}")
                written[-1].write_bytes(_file(figure, name, kind, digest(records)))
        return written

    write.__name__, write.__doc__ = name, draw.__doc__
    return write


def digest(records: list[Record]) -> str:
    """What an SVG file says of the records it shows, so that a stale one can be told."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _file(figure: Figure | None, name: str, kind: str, source: str | None = None) -> bytes:
    """The file's bytes: the same for the same records, whatever the day."""
    import matplotlib

    assert figure is not None
    unsaid = ("Creator", "Date", "Format", "Type") if kind == "svg" else ("Software",)
    metadata = dict.fromkeys(unsaid) | ({"Source": source} if source and kind == "svg" else {})
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(file := BytesIO(), format=kind, dpi=160, metadata=metadata)
    return file.getvalue()


@_plot
def speedup(records: list[Record], theme: Theme) -> Figure | None:
    """`speedup`: our ratio against the best peer for each op and dtype."""
    rows = [(h, h.best) for h in headlines(records) if h.ours and h.best and h.best["ratio"]]
    if not rows:
        return None
    ops = unique(h.op for h, _ in rows)
    notes = ("forward + backward, times as fast; right of 1× we are faster",
             "whisker: 10th to 90th percentile of paired rounds; named: the peer")  # fmt: skip
    height = 22 * len(ops) + 16 * len(rows)
    sheet = Sheet(theme, "Ours against the best peer", notes, height + 28)
    ends = ("ratio_low", "ratio", "ratio_high")
    spans = [sorted(math.log2(r[end] or r["ratio"]) for end in ends) for _, r in rows]
    texts = [(times(r["ratio"]), cut(contender(r), 110)) for _, r in rows]
    taken = [wide(text, BODY, "bold") + wide(peer) + 14 for text, peer in texts]
    left = MARGIN + max(wide(h.dtype, BODY) for h, _ in rows) + 10
    zero = max(left + 30, MARGIN + 8 + max(wide(op, BODY, "bold") for op in ops))
    # An octave is as long as leaves room for slower rows on the left and for the text on the right.
    units = [(EDGE - zero - used) / max(high, 0.05) for used, (_, _, high) in zip(taken, spans, strict=True)]
    unit = min(*units, (EDGE - zero) / 1.2, (zero - left) / max(0.05, -min(low for low, _, _ in spans)))
    bottom = sheet.y + height + 4
    sheet.line([(zero, sheet.y + 4), (zero, bottom)], "ink")
    step = math.ceil(36 / unit)
    lowest, highest = min(low for low, _, _ in spans), max(high for _, _, high in spans)
    for octave in range(-9 * step, 10 * step, step):
        place, colour = zero + octave * unit, "muted" if octave else "ink"
        if left <= place <= EDGE - 14 and min(0, lowest - 1) <= octave <= max(1, highest + 1):
            sheet.line([(place, bottom - 4), (place, bottom)], colour)
            sheet.text(place, bottom + 10, f"{2.0**octave:.4g}×", colour, ha="center")
    y = sheet.y
    for i, ((h, _), (low, middle, high), (text, peer)) in enumerate(zip(rows, spans, texts, strict=True)):
        if i == 0 or rows[i - 1][0].op != h.op:
            sheet.text(MARGIN, y + 13, h.op, "ink", BODY, weight="bold")
            y += 22
        sheet.text(MARGIN, y + 8, h.dtype, "muted", BODY)
        sheet.bar(zero, y + 8, middle * unit, "ours" if middle >= 0 else "peer")
        sheet.line([(zero + low * unit, y + 8), (zero + high * unit, y + 8)], "ink", 1.3)
        end = zero + max(high, 0) * unit + 5
        sheet.text(end, y + 8, text, "ours" if middle >= 0 else "ink", BODY, weight="bold")
        sheet.text(end + 5 + wide(text, BODY, "bold"), y + 8, peer, "muted")
        y += 16
    return sheet.figure


@_plot
def bars(records: list[Record], theme: Theme) -> Figure | None:
    """`bars`: milliseconds of each op's headline case by contender, with the roof."""
    shown = [h for h in headlines(records) if h.ours]
    if not shown:
        return None
    dtypes = unique(h.dtype for h in shown)
    panels = {op: [h for h in shown if h.op == op] for op in unique(h.op for h in shown)}
    names = {op: unique(contender(r) for h in panel for r in h.right) for op, panel in panels.items()}
    ours = {contender(r) for h in shown for r in h.right if r["peer"] is None}
    label = min(max(wide(name, BODY) for some in names.values() for name in some), 122) + 8
    column = (EDGE - MARGIN - label) / len(dtypes)
    notes = ["forward + backward, ms: shorter is better; each panel has its own scale",
             "vertical line: this machine's roof; ×: times our fastest"]  # fmt: skip
    limits = [LONGEST * min(r["seconds"] for r in h.right) for h in shown]
    if any(r["seconds"] > limit for h, limit in zip(shown, limits, strict=True) for r in h.right):
        notes.append("broken bar: longer than drawn")
    sheet = Sheet(theme, "Time of each op", notes, sum(32 + 14 * len(some) for some in names.values()) + 18)
    left = {dtype: MARGIN + label + column * i for i, dtype in enumerate(dtypes)}
    for dtype in dtypes:
        sheet.text(left[dtype], sheet.y + 10, dtype, "muted", BODY, weight="bold")
    sheet.y += 18
    for op, panel in panels.items():
        sheet.head(op, " / ".join(unique(h.case for h in panel)))
        rows = {name: sheet.y + 26 + 14 * i for i, name in enumerate(names[op])}
        for name, row in rows.items():
            sheet.text(MARGIN, row, cut(name, label - 6, BODY), "ours" if name in ours else "ink", BODY)
        for h in panel:
            entries = [(rows[contender(r)], 1e3 * r["seconds"], r) for r in h.right]
            limit = LONGEST * min(value for _, value, _ in entries)
            _bars(sheet, left[h.dtype], column - 10, entries, 1e3 * (h.right[0]["roof"] or 0), limit)
        sheet.y += 32 + 14 * len(rows)
    return sheet.figure


Row = tuple[float, float, Record]


def _bars(
    sheet: Sheet, x: float, width: float, rows: list[Row], roof: float = 0, limit: float = math.inf
) -> None:
    """Bars from x on for (y, value, record), as long as leaves room for the numbers at their ends.

    Columns too narrow for ratios go without.
    """
    texts = [(digits(value), times(r["ratio"]) if r["ratio"] and width > 90 else "") for _, value, r in rows]
    taken = [wide(text, BODY, "bold") + wide(more) + 10 for text, more in texts]
    drawn = [max(min(value, limit), roof) for _, value, _ in rows]
    scale = min((width - used) / length for used, length in zip(taken, drawn, strict=True))
    for (y, value, record), (text, more) in zip(rows, texts, strict=True):
        own = record["peer"] is None
        sheet.bar(x, y, min(value, limit) * scale, "ours" if own else "peer")
        end = x + max(min(value, limit), roof) * scale + 4
        if value > limit:
            for at in (end - 14, end - 18):
                sheet.line([(at - 2, y + 6), (at + 2, y - 6)], "paper", 1.5)
        sheet.text(end, y, text, "ours" if own else "ink", BODY, weight="bold" if own else "normal")
        sheet.text(end + 5 + wide(text, BODY), y, more, "muted")
    if roof:
        ys = [y for y, _, _ in rows]
        sheet.line([(x + roof * scale, min(ys) - 7), (x + roof * scale, max(ys) + 7)], "ink", 1.1)


@_plot
def roofline(records: list[Record], theme: Theme) -> Figure | None:
    """`roofline`: operations a second over operations a byte, under the measured roofs."""
    measured = [r for r in records if r["group"] == "roof" and r["seconds"]]
    copies = [r for r in measured if r["direction"] == "copy"]
    gemms = [r for r in measured if r["direction"] == "gemm"]
    shown = [h for h in headlines(records) if h.ours and h.ours["flops"] and h.ours["bytes"]]
    dtypes = [d for d in unique(h.dtype for h in shown) if any(r["dtype"] == d for r in gemms)]
    if not dtypes or not copies:
        return None
    notes = ("forward + backward; filled: ours, with its share of the roof; hollow: best peer",)
    sheet = Sheet(theme, "Operations a second, under the roof", notes, 222 * len(dtypes))
    for dtype in dtypes:
        same = [r for r in copies if r["dtype"] == dtype] or copies  # a copy's bandwidth knows no dtype
        bandwidth = max(r["bytes"] / r["seconds"] for r in same)
        rate = max(r["flops"] / r["seconds"] for r in gemms if r["dtype"] == dtype)
        sheet.head(dtype, f"copy {si(bandwidth, 'B/s', digits)}, matrix product {si(rate, 'FLOP/s', digits)}")
        _roofline(sheet, [h for h in shown if h.dtype == dtype], bandwidth, rate)
        sheet.y += 222
    return sheet.figure


def _roofline(sheet: Sheet, shown: list[Headline], bandwidth: float, rate: float) -> None:
    knee = rate / bandwidth
    both = [(h, r) for h in shown for r in (h.ours, h.best) if r]
    points = [(h, r, r["flops"] / r["bytes"], r["flops"] / r["seconds"]) for h, r in both]
    low_x, high_x = min(knee, *(p[2] for p in points)) / 4, max(knee, *(p[2] for p in points)) * 2
    low_y, high_y = min(p[3] for p in points) / 2.5, max(rate, *(p[3] for p in points)) * 1.6
    box = left, top, end, bottom = MARGIN + 60, sheet.y + 22, EDGE, sheet.y + 184
    x, y = logarithmic(low_x, high_x, left, end), logarithmic(low_y, high_y, bottom, top)
    sheet.grid([(x(tick), f"{tick:g}") for tick in powers(low_x, high_x, 10, 7)], box, across=False)
    sheet.grid([(y(tick), si(tick, "FLOP/s")) for tick in powers(low_y, high_y, 10, 5)], box, across=True)
    sheet.text((left + end) / 2, bottom + 21, "operations a byte", "muted", ha="center")
    start = max(low_x, low_y / bandwidth)
    sheet.line([(x(a), y(min(rate, bandwidth * a))) for a in (start, knee, high_x)], "muted", 1.5)
    for h, record, intensity, speed in points:
        spot, own = (x(intensity), y(speed)), record is h.ours
        if own and h.best:
            sheet.line([spot, (spot[0], y(h.best["flops"] / h.best["seconds"]))], "muted", 0.8)
        style = {"markersize": 7.5, "zorder": 3} if own else {"markersize": 5.5, "zorder": 4}
        sheet.line(
            [spot], "ours" if own else "muted", marker="o", fillstyle="full" if own else "none", **style
        )
    # Names stand under the roof, on that side of their points where the middle is.
    names = sorted((y(speed), x(intensity), f"{h.op} {100 * (r['share_of_roof'] or 0):.0f} %")
                   for h, r, intensity, speed in points if r is h.ours)  # fmt: skip
    standing = [(0.0, top - 11)]  # left ends and heights of the last names of each side
    for far in (True, False):
        named = [name for name in names if (name[1] > (left + end) / 2) == far]
        if not named:
            continue
        edge = min(p[1] for p in named) - 16 if far else max(p[1] for p in named) + 16
        widest = max(wide(words) for _, _, words in named)
        first = edge - widest * far
        roof = y(min(rate, bandwidth * low_x * (high_x / low_x) ** ((first - left) / (end - left))))
        taken = max(height for start, height in standing if first + widest > start)
        rows = stacked([p[0] for p in named], 11, max(taken + 11, roof + 8), bottom - 5)
        standing.append((first, rows[-1]))
        for (height, place, words), row in zip(named, rows, strict=True):
            sheet.text(edge, row, words, "ink", ha="right" if far else "left")
            sheet.line([(edge + (3 if far else -3), row), (place, height)], "muted", 0.6, zorder=1)


@_plot
def memory(records: list[Record], theme: Theme) -> Figure | None:
    """`memory`: peak bytes against the swept size."""
    return _series(records, theme, "peak_bytes", "Peak memory as one size grows", size, 2)


@_plot
def scaling(records: list[Record], theme: Theme) -> Figure | None:
    """`scaling`: seconds against the swept size."""
    return _series(records, theme, "seconds", "Time as one size grows", lambda v: si(v, "s"), 10)


def _series(
    records: list[Record], theme: Theme, quantity: str, title: str, unit: Callable[[float], str], base: int
) -> Figure | None:
    """A panel for each op, swept size, dtype and other sizes; in it a line for each contender."""
    panels: dict[tuple[str, str], dict[str, list[Spot]]] = {}
    ours: list[str] = []
    peers: list[str] = []
    failed = set()
    for r in (r for r in records if r["group"] == "scaling" and r["direction"] == "fwd+bwd" and "sweep" in r):
        kept = " ".join(f"{k} {v}" for k, v in r["dims"].items() if k != r["sweep"])
        key, name = (r["op"], f"{r['dtype']}, over {DIMENSIONS[r['sweep']]}; {kept}"), contender(r)
        if right(r) and r[quantity]:
            (ours if r["peer"] is None else peers).append(name)
            panels.setdefault(key, {}).setdefault(name, []).append((r["dims"][r["sweep"]], r[quantity]))
        elif r["status"] == "failed":
            failed.add((key, name))
    if not panels:
        return None
    colours = {name: f"line{i % 6}" for i, name in enumerate(unique(peers))} | dict.fromkeys(ours, "ours")
    label = min(max(wide(name, SMALL, "bold") for name in colours), 118) + 11
    heights = [max(100, 11 * len(lines)) for lines in panels.values()]
    marked = any((key, name) in failed for key, lines in panels.items() for name in lines)
    notes = ("forward + backward; both axes are logarithmic" + "; ✕: failed beyond" * marked,)
    sheet = Sheet(theme, title, notes, sum(heights) + 52 * len(panels))
    for (key, lines), height in zip(panels.items(), heights, strict=True):
        sheet.head(*key)
        box = left, top, end, bottom = MARGIN + 48, sheet.y + 24, EDGE - label, sheet.y + 24 + height
        sizes, values = (sorted({spot[i] for line in lines.values() for spot in line}) for i in (0, 1))
        x = logarithmic(sizes[0], max(sizes[-1], sizes[0] + 1), left + 8, end - 5)
        y = logarithmic(values[0] / 1.4, values[-1] * 1.4, bottom, top)
        ticks = powers(values[0] / 1.4, values[-1] * 1.4, base, 5)
        sheet.grid([(y(v), unit(v)) for v in ticks], box, across=True)
        clear = WIDTH
        for v in reversed(sizes):
            if x(v) + wide(str(v)) / 2 < clear:
                sheet.text(x(v), bottom + 9, str(v), "muted", ha="center")
                clear = x(v) - wide(str(v)) / 2 - 5
        ends = sorted((y(max(line)[1]), name) for name, line in lines.items())
        rows = stacked([place for place, _ in ends], 11, top + 4, bottom - 4)
        for (last, name), row in zip(ends, rows, strict=True):
            own, colour, line = name in ours, colours[name], [(x(a), y(b)) for a, b in sorted(lines[name])]
            style: dict[str, Any] = {"linestyle": "--" if own and name != ours[0] else "-", "zorder": 3 + own}
            sheet.line(line, colour, 2.6 if own else 1.4, marker="o", markersize=3, **style)
            if (key, name) in failed:
                sheet.line(line[-1:], colour, marker="x", markersize=7, markeredgewidth=1.6, zorder=5)
            sheet.line([(line[-1][0] + 6, last), (end + 1, last), (end + 8, row)], colour, 0.7)
            sheet.text(end + 11, row, cut(name, EDGE - end - 11), colour, weight="bold" if own else "normal")
        sheet.y += 52 + height
    return sheet.figure


@_plot
def train(records: list[Record], theme: Theme) -> Figure | None:
    """`train`: tokens a second by contender, and the losses of the same steps."""
    cases = _trained(records, "train")
    if not cases:
        return None
    label = min(max(wide(contender(r), BODY) for rows in cases.values() for r in rows), 160) + 8
    notes = ("tokens a second: longer is better; ×: our fastest over it",)
    height = sum(32 + 14 * len(rows) + 98 * bool(_curves(rows)) for rows in cases.values())
    sheet = Sheet(theme, "Training", notes, height)
    for (dtype, case), rows in cases.items():
        sheet.head(dtype, case)
        entries = [(sheet.y + 26 + 14 * i, r["tokens_per_second"], r) for i, r in enumerate(rows)]
        for y, _, r in entries:
            sheet.text(MARGIN, y, cut(contender(r), label - 6, BODY), "ink" if r["peer"] else "ours", BODY)
        _bars(sheet, MARGIN + label, EDGE - MARGIN - label, entries)
        sheet.y += 32 + 14 * len(rows)
        if _curves(rows):
            _losses(sheet, _curves(rows))
            sheet.y += 98
    return sheet.figure


@_plot
def accelerate(records: list[Record], theme: Theme) -> Figure | None:
    """`accelerate`: tokens a second and peak memory of models of others, by contender."""
    cases = _trained(records, "accelerate")
    if not cases:
        return None
    label = min(max(wide(contender(r), BODY) for rows in cases.values() for r in rows), 130) + 8
    notes = ("left: tokens a second, longer is better; ×: our fastest over it",
             "right: MiB that a step takes at its peak, shorter is better")  # fmt: skip
    sheet = Sheet(theme, "Models of transformers", notes, sum(34 + 14 * len(rows) for rows in cases.values()))
    for (dtype, case), rows in cases.items():
        sheet.head(dtype, case)
        places = [sheet.y + 26 + 14 * i for i in range(len(rows))]
        for y, r in zip(places, rows, strict=True):
            sheet.text(MARGIN, y, cut(contender(r), label - 6, BODY), "ink" if r["peer"] else "ours", BODY)
        room = EDGE - MARGIN - label
        speeds = [(y, r["tokens_per_second"], r) for y, r in zip(places, rows, strict=True)]
        _bars(sheet, MARGIN + label, room - 96, speeds)
        weights = [
            (y, r["peak_bytes"] / 2**20, r) for y, r in zip(places, rows, strict=True) if r["peak_bytes"]
        ]
        if weights:
            _bars(sheet, EDGE - 86, 86, weights)
        sheet.y += 34 + 14 * len(rows)
    return sheet.figure


def _trained(records: list[Record], op: str) -> dict[tuple[str, str], list[Record]]:
    """What counts of an op's training steps, by dtype and case in their order; in each the fastest first."""
    cases: dict[tuple[str, str], list[Record]] = {}
    for r in (r for r in records if r["group"] == "train" and r["op"] == op):
        if right(r) and r.get("tokens_per_second"):
            cases.setdefault((r["dtype"], r["case"]), []).append(r)
    return {key: sorted(rows, key=lambda r: -r["tokens_per_second"]) for key, rows in cases.items()}


def _curves(rows: list[Record]) -> list[Record]:
    return sorted((r for r in rows if len(r.get("losses") or ()) > 1), key=lambda r: r["peer"] is None)


def _losses(sheet: Sheet, rows: list[Record]) -> None:
    """The losses of the steps: peers wide, ours narrow on top of them, since they should coincide."""
    steps, values = max(len(r["losses"]) for r in rows), [v for r in rows for v in r["losses"]]
    off = max(abs(a - b) for r in rows for a, b in zip(r["losses"], rows[-1]["losses"], strict=False))
    words = f"loss of the first {steps} steps, nats; at most {digits(off)} apart"
    box = left, top, end, bottom = MARGIN + 34, sheet.y + 24, EDGE, sheet.y + 76
    low, high = min(values), max(values)
    unit = (bottom - top) / ((high - low) or 1)
    sheet.text(end, sheet.y + 9, words, "muted", ha="right")
    sheet.grid([(bottom - (v - low) * unit, digits(v)) for v in (low, high)], box, across=True)
    for r in rows:
        xs = [left + (end - left) * i / (steps - 1) for i in range(len(r["losses"]))]
        places = [(x, bottom - (v - low) * unit) for x, v in zip(xs, r["losses"], strict=True)]
        own = r["peer"] is None
        sheet.line(places, "ours" if own else "peer", 1.4 if own else 4.5, zorder=3 if own else 2)
