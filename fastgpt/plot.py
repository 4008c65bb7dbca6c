"""The two pictures of a run: its loss over the steps, and its loss over the position in the context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _VAL, _ENTROPY = "#9db8d9", "#c8442d", "#666666"


def loss_curve(
    path: str | Path,
    train: Sequence[tuple[int, float]],
    val: Sequence[tuple[int, float]],
    entropy: float,
    entropy_name: str,
) -> None:
    """Write the (step, loss) curves as a PNG, with the loss of the best model without context as a dashed
    line.
    """
    figure, axes = _canvas("step", "loss, nats a token")
    if train:
        axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=1, label="training")
    if val:
        axes.plot(
            *zip(*val, strict=True), color=_VAL, linewidth=2, marker="o", markersize=3.5, label="validation"
        )
        axes.annotate(
            f"{val[-1][1]:.3f}", val[-1], xytext=(0, 8), textcoords="offset points", ha="center", color=_VAL
        )
    axes.axhline(entropy, color=_ENTROPY, linestyle="--", linewidth=1, label=f"{entropy_name} {entropy:.2f}")
    axes.legend(frameon=False)
    _write(figure, path)


def loss_by_position(path: str | Path, buckets: Sequence[tuple[int, int, float]], mean: float) -> None:
    """Write the loss of each (first, last, loss) range of positions as a PNG, positions on a logarithmic
    axis.
    """
    figure, axes = _canvas("position in the context", "loss, nats a token")
    axes.plot([(first * last) ** 0.5 for first, last, _ in buckets], [loss for *_, loss in buckets],
              color=_VAL, linewidth=2, marker="o", markersize=3.5)  # fmt: skip
    axes.axhline(mean, color=_ENTROPY, linestyle="--", linewidth=1, label=f"mean {mean:.3f}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    _write(figure, path)


def _canvas(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
