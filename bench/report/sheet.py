"""What the plots are drawn on and with: sheets of one width, laid out in points.

Shown at half the width of a README, where a sheet is about 430 pixels wide, a point is a little more than a
pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Theme = Mapping[str, str]
Spot = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

WIDTH, MARGIN = 390.0, 12.0
EDGE = WIDTH - MARGIN
TITLE, BODY, SMALL = 12.5, 10.0, 9.0
FONT = "DejaVu Sans"  # comes with matplotlib: the same picture everywhere

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


class Sheet:
    """A page of text and shapes in points from its top left; `y` is where the next panel starts."""

    def __init__(self, theme: Theme, title: str, notes: Sequence[str], height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.theme, self.y = theme, 28 + 13.0 * len(notes)
        self.figure = Figure(figsize=(WIDTH / 72, (self.y + height) / 72), facecolor=theme["paper"])
        FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(self.y + height, 0))
        self.axes.set_axis_off()
        self.text(MARGIN, 17, title, "ink", TITLE, weight="bold")
        for i, note in enumerate(notes):
            self.text(MARGIN, 34 + 13 * i, note, "muted")

    def text(self, x: float, y: float, words: str, colour: str, points: float = SMALL, **more: Any) -> None:
        more.setdefault("va", "center_baseline")
        more |= {"family": FONT, "parse_math": False, "fontsize": points}
        self.axes.text(x, y, words, color=self.theme[colour], **more)

    def line(self, places: Iterable[Spot], colour: str, width: float = 1, **more: Any) -> None:
        more.setdefault("zorder", 2)
        xs, ys = zip(*places, strict=True)
        self.axes.plot(xs, ys, color=self.theme[colour], linewidth=width, solid_capstyle="butt", **more)

    def bar(self, x: float, y: float, width: float, colour: str) -> None:
        self.axes.barh(y, width, 9, left=x, color=self.theme[colour], linewidth=0)

    def head(self, op: str, detail: str) -> None:
        """The line above a panel: the op, and what is shown of it."""
        self.text(MARGIN, self.y + 10, op, "ink", BODY + 0.5, weight="bold")
        start = MARGIN + wide(op, BODY + 0.5, "bold") + 7
        self.text(start, self.y + 10, cut(detail, EDGE - start), "muted")

    def grid(self, ticks: Iterable[tuple[float, str]], box: Box, *, across: bool) -> None:
        """Lines through a box with their words below it or, for lines across, left of it."""
        left, top, end, bottom = box
        for place, words in ticks:
            ends = [(left, place), (end, place)] if across else [(place, top), (place, bottom)]
            self.line(ends, "grid", 0.6, zorder=0)
            where = (left - 5, place) if across else (place, bottom + 9)
            self.text(*where, words, "muted", ha="right" if across else "center")


@lru_cache(maxsize=4096)
def wide(text: str, points: float = SMALL, weight: str = "normal") -> float:
    """The width of a text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties(family=FONT, weight=weight, size=points)
    return float(TextToPath().get_text_width_height_descent(text, font, ismath=False)[0])


def cut(text: str, room: float, points: float = SMALL) -> str:
    """A text, shortened to the room there is."""
    while len(text) > 1 and wide(text, points) > room:
        text = text.rstrip("…")[:-1].rstrip() + "…"
    return text


def stacked(heights: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Ascending heights moved as little as puts a gap between them, within bounds."""
    rows = list(heights)
    for i in range(len(rows)):
        rows[i] = max(rows[i], rows[i - 1] + gap if i else top)
    for i in reversed(range(len(rows))):
        rows[i] = min(rows[i], rows[i + 1] - gap if i + 1 < len(rows) else bottom)
    return rows


def logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The map from values between low and high to points between start and end."""
    return lambda value: start + math.log(value / low) / math.log(high / low) * (end - start)


def powers(low: float, high: float, base: int, most: int) -> list[float]:
    """Powers of a base between two values, at most so many; where there is one of ten, twos and fives too."""
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    if base == 10 and last - first < 1:
        return [v for e in (first - 1, first, last) for m in (1, 2, 5) if low <= (v := m * 10.0**e) <= high]
    return [float(base) ** e for e in range(first, last + 1, max(1, math.ceil((last - first + 1) / most)))]
