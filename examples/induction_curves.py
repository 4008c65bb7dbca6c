"""Plot the induction accuracy of runs over their steps, for example of one layer beside two (docs/in_context.md).

python examples/induction_curves.py PNG RUN [RUN ...]
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path

from matplotlib.figure import Figure

COLORS = ("#c8442d", "#3b6fb6", "#4c9a4c", "#666666")


def curve(run: Path) -> tuple[str, list[tuple[float, ...]]]:
    """Read a run of `fastgpt train --data repeats`: its label and (step, accuracy, low, high) of each validation."""
    names = ("step", "induction", "induction_low", "induction_high")
    try:
        layers = tomllib.loads((run / "config.toml").read_text("utf-8"))["n_layer"]
        records = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
        found = [tuple(float(record[name]) for name in names) for record in records if "induction" in record]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{run} is not the directory of a run: {error}") from None
    return f"{layers} layer{'s' * (layers > 1)} ({run.name})", found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", metavar="PNG")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="directory of a run")
    options = parser.parse_args()
    figure = Figure(figsize=(7, 4.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    try:
        for run, color in zip(options.runs, COLORS, strict=False):
            label, points = curve(run)
            steps, accuracies, lows, highs = zip(*points, strict=True)
            axes.fill_between(steps, lows, highs, color=color, alpha=0.2, linewidth=0)
            axes.plot(steps, accuracies, color=color, linewidth=2, label=label)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    axes.axhline(0.9, color="#666666", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel="induction accuracy", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(options.picture)


if __name__ == "__main__":
    main()
