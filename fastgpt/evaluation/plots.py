"""Plots of a run: loss over steps, loss by position in the context, in-context learning."""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastgpt.atomic_io import naming_errors, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastgpt.evaluation.bootstrap import Estimate
    from fastgpt.evaluation.in_context import InContext

F = TypeVar("F", bound=Callable[..., None])
_TRAIN, _VAL, _ENTROPY = "#9db8d9", "#c8442d", "#666666"


class PlotError(ValueError):
    """Error of matplotlib; the message contains the file and the reason."""


def _drawing(draw: F) -> F:
    """Decorate a plotting function: hide MPLBACKEND from it, and add the file name to its errors.

    A notebook sets MPLBACKEND for its own process. If that backend is not installed, importing matplotlib fails,
    although no backend is needed here.
    """

    @functools.wraps(draw)
    def drawn(path: str | Path, *arguments: Any, **options: Any) -> None:
        backend = os.environ.pop("MPLBACKEND", None)
        try:
            draw(path, *arguments, **options)
        except OSError:
            raise
        except Exception as error:
            reason = str(error).splitlines() or [type(error).__name__]
            raise PlotError(f"the plot {path} could not be drawn: {reason[0]}") from error
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend

    return cast(F, drawn)


@_drawing
def loss_curve(
    path: str | Path,
    train: Sequence[tuple[int, float]],
    val: Sequence[tuple[int, float]],
    entropy: float,
    entropy_name: str,
    title: str,
) -> None:
    """Write the (step, loss) curves as a PNG, with the entropy of a model without context as a dashed line.

    The best validation loss is named, and the last one if it is another.
    """
    from matplotlib.ticker import MaxNLocator

    train, val = ([point for point in curve if math.isfinite(point[1])] for curve in (train, val))
    figure, axes = _canvas("step", "loss, nats per token")
    if train:
        axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=1.5, label="training")
    if val:
        axes.plot(
            *zip(*val, strict=True), color=_VAL, linewidth=2, marker="o", markersize=3.5, label="validation"
        )
        best = min(val, key=lambda point: point[1])
        for point in dict.fromkeys((best, val[-1])):
            text = f"best {point[1]:.3f}" if point == best else f"{point[1]:.3f}"
            axes.annotate(
                text, point, xytext=(0, 8), textcoords="offset points", ha="center", color=_VAL, clip_on=False
            )
    axes.axhline(entropy, color=_ENTROPY, linestyle="--", linewidth=1, label=entropy_name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, loc="left", fontsize="medium")
    axes.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    replace_file(Path(path), drawn.getvalue())


@_drawing
def loss_by_position(path: str | Path, buckets: Sequence[tuple[int, int, float]], mean: float) -> None:
    """Write the loss of each (first, last, loss) range of positions as a PNG with a logarithmic axis."""
    figure, axes = _canvas("position in the context", "loss, nats per token")
    axes.plot([(first * last) ** 0.5 for first, last, _ in buckets], [loss for *_, loss in buckets],
              color=_VAL, linewidth=2, marker="o", markersize=3.5)  # fmt: skip
    axes.axhline(mean, color=_ENTROPY, linestyle="--", linewidth=1, label=f"mean {mean:.3f}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    _write(figure, path)


@_drawing
def in_context_panels(path: str | Path, found: InContext) -> None:
    """Write the results of `fastgpt.evaluation.in_context` as a PNG, a panel per measurement, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * (3 if found.positions else 2), 3.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 if found.positions else 2)
    induction = found.induction
    _frame(panels[0], "length of the repeated word", "accuracy")
    for name, estimates, color in (
        ("second pass", [item.second for item in induction], _VAL),
        ("first pass", [item.first for item in induction], _TRAIN),
    ):
        _with_interval(panels[0], [item.length for item in induction], estimates, color, name)
    _frame(panels[1], "examples in the context", "accuracy")
    for number, name in enumerate(dict.fromkeys(item.functions for item in found.shots)):
        curve = [item for item in found.shots if item.functions == name]
        _with_interval(
            panels[1], [item.shots for item in curve], [i.accuracy for i in curve], f"C{number}", name
        )
    for panel, title in zip(panels, ("induction", "k-shot"), strict=False):
        panel.axhline(found.chance, color=_ENTROPY, linestyle="--", linewidth=1, label="chance")
        panel.set_title(title)
        panel.set_ylim(-0.03, 1.03)
        panel.legend(frameon=False)
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[1].set_xscale("symlog", base=2, linthresh=1)
    panels[1].xaxis.set_major_formatter("{x:g}")
    if found.positions:
        _frame(panels[2], "position in the context", "loss, nats per token")
        middle = [(item.first * item.last) ** 0.5 for item in found.positions]
        _with_interval(panels[2], middle, [item.loss for item in found.positions], _VAL, None)
        panels[2].set_xscale("log", base=2)
        panels[2].xaxis.set_major_formatter("{x:g}")
        panels[2].set_title("loss by position")
    _write(figure, path)


def _with_interval(
    axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], color: str, label: str | None
) -> None:
    means = [item.value for item in estimates]
    bars = [[i.value - i.low for i in estimates], [i.high - i.value for i in estimates]]
    axes.errorbar(
        x, means, yerr=bars, color=color, linewidth=2, marker="o", markersize=3.5, capsize=2, label=label
    )


def _canvas(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _frame(axes, xlabel, ylabel)
    return figure, axes


def _frame(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming_errors(Path(path)):
        figure.savefig(path)
