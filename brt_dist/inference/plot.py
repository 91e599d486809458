"""The picture of an evaluation: loss by document position, and how many documents reach so far. matplotlib's door."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

# Red is kept for the number of documents.
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f", "#e377c2")
RED = "#d62728"
# Means over the first few tokens of a few documents are mostly noise and would set the scale of everything behind.
FIRST_SHOWN = 32


def plot_evaluation(report: dict[str, Any], path: Path) -> None:
    """Draws the report of `evaluation_report` as a PNG: cumulative bits per token above, number of documents below."""
    figure = Figure(figsize=(7.0, 5.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    _draw_losses(above, report["runs"])
    above.set_title(f"Loss by document position, {report['split']} split", fontsize=12)
    curve = report["runs"][0]["curve"]
    _draw_documents(below, curve["positions"], curve["documents_at_least"])
    last = curve["positions"][-1]
    first = FIRST_SHOWN if last >= 4 * FIRST_SHOWN else 1
    below.set_xscale("log")
    below.set_xlim(first, max(last, 2))
    below.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if last < 3e4 * first else (1,), numticks=30))
    below.xaxis.set_major_formatter(FuncFormatter(_short))
    below.xaxis.set_minor_formatter(NullFormatter())
    below.set_xlabel("document position (tokens)")
    figure.align_ylabels()
    figure.savefig(path, format="png")


def _draw_losses(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    order = list(dict.fromkeys(run["run"] for run in runs))
    colours = {run: COLOURS[number % len(COLOURS)] for number, run in enumerate(order)}
    for run in runs:
        curve = run["curve"]
        style = "-" if run["clear_carry_every"] is None else (0, (4, 2))
        axes.plot(
            curve["positions"],
            curve["bits_per_token"],
            color=colours[run["run"]],
            linestyle=style,
            linewidth=1.6,
            label=f"{run['label']}: {_value(run['bits_per_token'], run['bits_per_token_standard_error'])}",
        )
    axes.set_ylim(*_shown_range([run["curve"] for run in runs]))
    axes.set_ylabel("bits per token, mean of\nall tokens up to position")
    axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
    with_errors = any(run["bits_per_token_standard_error"] is not None for run in runs)
    title = "bits per token over all" + (", ± standard error over documents" if with_errors else "")
    axes.legend(title=title, title_fontsize=8, fontsize=8, framealpha=0.9, alignment="left")


def _draw_documents(axes: Axes, positions: Sequence[int], at_least: Sequence[int]) -> None:
    # Between two points the count lies between theirs; the lower one is drawn.
    axes.step(positions, at_least, where="pre", color=RED, linewidth=1.6)
    axes.set_ylabel("documents at\nleast so long", color=RED)
    axes.tick_params(axis="y", colors=RED)
    largest = max(at_least)
    axes.set_yscale("log")
    axes.set_ylim(0.8, largest * 1.35)
    ticks = [10.0**power for power in range(math.ceil(math.log10(largest)) + 1) if 10.0**power <= 0.6 * largest]
    axes.yaxis.set_major_locator(FixedLocator([*ticks, largest]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", linewidth=0.5, alpha=0.4)


def _shown_range(curves: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Limits that hold every curve from the first shown position on, and a little air."""
    shown = []
    for curve in curves:
        positions, bits = np.array(curve["positions"]), np.array(curve["bits_per_token"])
        shown.append(bits[positions >= FIRST_SHOWN] if positions[-1] >= 4 * FIRST_SHOWN else bits)
    values = np.concatenate(shown)
    air = max(0.05 * float(values.max() - values.min()), 0.01)
    return float(values.min()) - air, float(values.max()) + air


def _value(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _short(value: float, _: object = None) -> str:
    """1000 as 1k, 1000000 as 1M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"
