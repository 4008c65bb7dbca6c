"""Plots of benchmark results: SVG files that are readable on a light and on a dark background."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

from bench.harness.records import Record, contender, is_timed
from bench.report.headlines import (
    format_bytes,
    format_percent,
    format_rate,
    format_ratio,
    headlines,
    unique,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS = {
    "speedup": "Speedup over the fastest verified peer, by op and dtype",
    "roofline": "FLOP/s over arithmetic intensity, below the measured roofline",
    "memory": "Peak memory of forward and backward over one size, by contender",
    "training": "Tokens/s and peak memory of training steps, by contender",
}

# Mid-tones: contrast of at least 3 with white and with GitHub's dark page.
TEXT, OURS, PEER = "#7b838c", "#e0532a", "#8f99a3"
COLORS = ("#3f85c6", "#1f9c86", "#9a6fd0", "#b08312", "#c4579b", "#6f8a2e")
MARKERS = "os^vDP*X<>phd"
WIDTH = 5.6  # inches
STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.titlelocation": "left", "figure.titlesize": 10,
    "figure.titleweight": "bold", "legend.fontsize": 7, "legend.frameon": False, "lines.linewidth": 1.2,
    "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.transparent": True, "svg.fonttype": "path", "text.color": TEXT,
    "axes.edgecolor": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "grid.color": TEXT,
}  # fmt: skip


def digest(records: list[Record]) -> str:
    """Hash the records. Each SVG file contains the hash of its records, so that a stale file can be detected."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def svg(name: str, records: list[Record]) -> str | None:
    """Draw the plot `name` of `PLOTS`.

    Returns:
        The text of an SVG file, the same for the same records; None if the records have no data for the plot.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = draw(name, records)
        if figure is None:
            return None
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) | {"Source": digest(records)}
        figure.savefig(file := BytesIO(), format="svg", metadata=metadata)
    return file.getvalue().decode()


def draw(name: str, records: list[Record]) -> Figure | None:
    """Draw the plot `name` of `PLOTS` as a figure; None if the records have no data for it."""
    functions = {"speedup": _speedup, "roofline": _roofline, "memory": _memory, "training": _training}
    return functions[name](records)


def _figure(height: float, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _label(axes: Axes, x: float, y: float, text: str, color: str = TEXT) -> None:
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", color=color)


def _speedup(records: list[Record]) -> Figure | None:
    """Draw a bar for each op and dtype: the ratio to the fastest peer, with the percentiles of the rounds."""
    rows = [(h, h.best_peer) for h in headlines(records) if h.ours and h.best_peer and h.best_peer["ratio"]]
    if not rows:
        return None
    figure = _figure(0.9 + 0.17 * len(rows), "Speedup over the fastest peer, forward + backward")
    axes = figure.subplots()
    for y, (_, peer) in enumerate(rows):
        ratio = peer["ratio"]
        low, high = peer["ratio_low"] or ratio, peer["ratio_high"] or ratio
        axes.barh(y, ratio - 1, left=1, height=0.7, color=OURS if ratio >= 1 else PEER)
        axes.plot([low, high], [y, y], color=TEXT)
        _label(axes, max(high, 1), y, f"{format_ratio(ratio)} {contender(peer)}")
    axes.axvline(1, color=TEXT)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_xlabel("peer's time / ours; line: 10th to 90th percentile of rounds")
    axes.set_yticks(range(len(rows)), [f"{h.op} {h.dtype}" for h, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def _roofline(records: list[Record]) -> Figure | None:
    """Draw a panel for each dtype: ours and the fastest peer of each op below the measured roofline bounds."""
    bounds = [r for r in records if r["group"] == "roofline" and r["seconds"]]
    copies = [r for r in bounds if r["direction"] == "copy"]
    matmuls = [r for r in bounds if r["direction"] == "matmul"]
    shown = [h for h in headlines(records) if h.ours and h.ours["flops"] and h.ours["bytes"]]
    dtypes = [d for d in unique(h.dtype for h in shown) if any(r["dtype"] == d for r in matmuls)]
    if not dtypes or not copies:
        return None
    ops = unique(h.op for h in shown)
    figure = _figure(0.5 + 2.4 * len(dtypes), "Roofline, forward + backward")
    for dtype, axes in zip(dtypes, figure.subplots(len(dtypes), 1, squeeze=False)[:, 0], strict=True):
        same = [r for r in copies if r["dtype"] == dtype] or copies
        bandwidth = max(r["bytes"] / r["seconds"] for r in same)
        peak = max(r["flops"] / r["seconds"] for r in matmuls if r["dtype"] == dtype)
        intensities = [peak / bandwidth]
        for h in (h for h in shown if h.dtype == dtype):
            marker = MARKERS[ops.index(h.op) % len(MARKERS)]
            for r in (h.best_peer, h.ours):
                if r and r["flops"]:
                    point = r["flops"] / r["bytes"], r["flops"] / r["seconds"]
                    intensities.append(point[0])
                    share = format_percent(r["share_of_roofline"] or 0)
                    own: dict[str, Any] = {"color": OURS, "label": f"{h.op}, {share}", "zorder": 3}
                    peer = {"color": PEER, "fillstyle": "none"}
                    axes.plot(*point, marker, markersize=5, **(own if r is h.ours else peer))
        ends = [min(intensities) / 3, peak / bandwidth, max(intensities) * 2]
        axes.plot(ends, [min(peak, bandwidth * x) for x in ends], color=TEXT)
        axes.set_title(f"{dtype}: copy {format_rate(bandwidth, 'B/s')}, matmul {format_rate(peak, 'FLOP/s')}")
        axes.set(xscale="log", yscale="log", ylabel="FLOP/s")
        axes.grid(True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), title="ours (hollow: fastest peer)")
    axes.set_xlabel("FLOPs per byte; the percentage is the share of the roofline bound")
    return figure


def _memory(records: list[Record]) -> Figure | None:
    """Draw a panel for each scaling series and a line for each contender."""
    series: dict[tuple[str, str, str], dict[str, dict[int, int]]] = {}
    failed = set()
    for r in (r for r in records if r["group"] == "scaling" and r["direction"] == "fwd+bwd" and "sweep" in r):
        panel, name = (r["op"], r["dtype"], r["sweep"]), contender(r)
        if is_timed(r) and r["peak_bytes"]:
            series.setdefault(panel, {}).setdefault(name, {})[r["dims"][r["sweep"]]] = r["peak_bytes"]
        elif r["status"] == "failed":
            failed.add((panel, name))
    if not series:
        return None
    names = unique(name for lines in series.values() for name in lines)
    peers = [name for name in names if not name.startswith("fastgpt ")]
    rows = -(-len(series) // 2)
    figure = _figure(1.0 + 1.6 * rows, "Peak memory, forward + backward")
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in grid[len(series) :]:
        axes.set_axis_off()
    for (panel, lines), axes in zip(series.items(), grid, strict=False):
        for name, points in lines.items():
            own = name not in peers
            color = OURS if own else COLORS[peers.index(name) % len(COLORS)]
            style = ".-" if own or peers.index(name) < len(COLORS) else ".--"
            xs, ys = zip(*sorted(points.items()), strict=True)
            axes.plot(xs, ys, style, color=color, label=name, zorder=2 + own)
            if (panel, name) in failed:
                axes.plot(*max(points.items()), "x", color=color, markersize=7)
        axes.set_title("{}, {}, over {}".format(*panel))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter(lambda value, _: format_bytes(value))
        axes.grid(True)
    handles: dict[str, Any] = {str(h.get_label()): h for axes in figure.axes for h in axes.lines}
    handles = {name: handles[name] for name in names}
    marked = any((panel, name) in failed for panel, lines in series.items() for name in lines)
    title = "×: the next size failed" if marked else None
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=3, title=title)
    return figure


def _training(records: list[Record]) -> Figure | None:
    """Draw a panel for each model, size and dtype and a bar for each contender, the fastest first."""
    panels: dict[str, list[Record]] = {}
    for r in records:
        if r["group"] == "train" and is_timed(r) and r.get("tokens_per_second"):
            model = "GPT " if r["op"] == "train" else ""
            panels.setdefault(f"{model}{r['case']}, {r['dtype']}", []).append(r)
    if not panels:
        return None
    heights = [1.6 + len(rows) for rows in panels.values()]
    figure = _figure(0.5 + 0.17 * sum(heights), "Training: tokens/s, speedup of ours, peak memory of a step")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (title, rows), axes in zip(panels.items(), grid, strict=True):
        rows.sort(key=lambda r: -r["tokens_per_second"])
        for y, r in enumerate(rows):
            speed, own = r["tokens_per_second"], r["peer"] is None
            axes.barh(y, speed, height=0.7, color=OURS if own else PEER)
            words = [f"{speed:,.0f}", *([format_ratio(r["ratio"])] if r["ratio"] else [])]
            words += [format_bytes(r["peak_bytes"])] if r["peak_bytes"] else []
            _label(axes, speed, y, ", ".join(words), OURS if own else TEXT)
        axes.set_title(title)
        axes.set_yticks(range(len(rows)), [contender(r) for r in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    return figure
