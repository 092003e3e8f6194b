"""Plots of the project's results, in docs/figures: curves beside published ones, accuracy against size, chains."""

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnn_jax.report.documents import METHODS
from bnn_jax.report.plots import CLASS_COLOURS, DOTS_PER_INCH, GRAY, INK, MARKERS, new_figure, style_axis
from bnn_jax.report.results import FOLDER, Row, read_rows

FIGURES = Path("docs") / "figures"
PUBLISHED_COLOUR = "#bbbbbb"
STYLES = {method: (CLASS_COLOURS[i], MARKERS[i]) for i, method in enumerate(METHODS)}
PANELS_PER_ROW, SHORTEST_AXIS = 3, 20
# Rungs that make a chain.
LEAST_RUNGS = 3
# Images of a complete training set; accuracies of fewer are drawn hollow.
COMPLETE = {"cifar10": 50_000, "cifar100": 50_000, "mnist": 60_000}


def draw(root: Path) -> list[Path]:
    """Draws all plots of the results in ``root``; one that there is nothing for is left out.

    Raises:
      UserError: a result is incomplete, or matplotlib is not installed.
    """
    rows, drawn = read_rows(root / FOLDER), []
    (root / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        figure = plot(rows)
        if figure is not None:
            drawn.append(root / FIGURES / f"{name}.png")
            # Without the version of matplotlib, so that an unchanged plot is an unchanged file.
            figure.savefig(drawn[-1], dpi=DOTS_PER_INCH, metadata={"Software": None})
    return drawn


def plot_curves(rows: Sequence[Row]) -> Any:
    """Test accuracy of every epoch, over the published curve; None where no result has one."""
    shown = [row for row in rows if row.curve and row.published and row.published.curve]
    if not shown:
        return None
    columns = min(PANELS_PER_ROW, len(shown))
    height = math.ceil(len(shown) / columns)
    figure = new_figure(width=max(4.4 * columns, 6.0), height=3.6 * height)
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    for axis, row in zip(axes, shown):
        _draw_curve(axis, row)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    return figure


def _draw_curve(axis: Any, row: Row) -> None:
    assert row.published is not None
    ours, published = [accuracy.mean for accuracy in row.curve], row.published.curve
    shown = min(max(SHORTEST_AXIS, 2 * len(ours)), max(len(published), len(ours)))
    behind = published[:shown]
    axis.plot(1 + np.arange(len(behind)), behind, color=PUBLISHED_COLOUR, linewidth=3, label="published")
    colour, marker = STYLES[row.method]
    epochs = 1 + np.arange(len(ours))
    axis.plot(epochs, ours, color=colour, marker=marker, markersize=4, linewidth=1.4, label="this project")
    _draw_band(axis, epochs, row, colour)
    axis.set_xlim(0.5, shown + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(textwrap.fill(row.title, width=60), fontsize=9, color=INK)
    style_axis(axis, x_label="epoch", y_label="test top-1 (%)")
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_band(axis: Any, epochs: np.ndarray, row: Row, colour: str) -> None:
    """One standard deviation to both sides, where there are several seeds."""
    if row.curve[0].deviation is None:
        return
    mean, deviation = (np.array([getattr(point, name) for point in row.curve]) for name in ("mean", "deviation"))
    axis.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)


def plot_accuracy(rows: Sequence[Row]) -> Any:
    """Accuracy on CIFAR-10 against stored bits and bit operations; None without any. First epochs are left out."""
    known = [row for row in rows if row.data == "cifar10" and row.stored_bits and (row.epochs or 0) != 1]
    if not known:
        return None
    figure = new_figure(width=11.0, height=4.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axis, size, label in zip(
        panels, ("stored_bits", "bit_operations"), ("stored bits, floats included", "bit operations per image")
    ):
        for row in known:
            if getattr(row, size):
                _draw_point(axis, row, getattr(row, size))
        axis.set_xscale("log")
        style_axis(axis, x_label=label, y_label="test top-1 of the last epoch (%)" if axis is panels[0] else "")
    for method in dict.fromkeys(row.method for row in known):
        colour, marker = STYLES[method]
        panels[0].scatter([], [], color=colour, marker=marker, label=METHODS[method])
    panels[0].legend(frameon=False, fontsize=8, loc="best")
    figure.supxlabel(
        "numbers: bits per weight; hollow: trained on a part of the training images", fontsize=8, color=GRAY
    )
    return figure


def _draw_point(axis: Any, row: Row, size: int) -> None:
    colour, marker = STYLES[row.method]
    partial = row.num_train is not None and row.num_train < COMPLETE[row.data]
    axis.scatter(size, row.last.mean, s=44, marker=marker, edgecolors=colour, facecolors="none" if partial else colour)
    axis.annotate(f"{row.bits:.2g}", (size, row.last.mean), xytext=(5, 4), textcoords="offset points", fontsize=7)


def plot_chains(rows: Sequence[Row]) -> Any:
    """The last epoch of every rung of each chain, with a band where there are several seeds; None without a chain."""
    chains = [list(rungs) for _, rungs in itertools.groupby(rows, key=lambda row: row.files)]
    chains = [rungs for rungs in chains if len({rung.bits for rung in rungs}) >= LEAST_RUNGS]
    if not chains:
        return None
    bits = sorted({rung.bits for rungs in chains for rung in rungs}, reverse=True)
    figure = new_figure(width=7.0, height=4.2)
    axis = figure.subplots()
    for index, rungs in enumerate(chains):
        colour = CLASS_COLOURS[index % len(CLASS_COLOURS)]
        places, mean = [bits.index(rung.bits) for rung in rungs], np.array([rung.last.mean for rung in rungs])
        title = rungs[0].title.rpartition(", ")[0]
        axis.plot(places, mean, color=colour, marker=MARKERS[index % len(MARKERS)], linewidth=1.4, label=title)
        if all(rung.last.deviation is not None for rung in rungs):
            deviation = np.array([rung.last.deviation for rung in rungs])
            axis.fill_between(places, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
    axis.set_xticks(range(len(bits)), [f"{value:.3g}" for value in bits])
    style_axis(axis, x_label="bits of weights and activations", y_label="test top-1 of the last epoch (%)")
    axis.legend(frameon=False, fontsize=8, loc="best")
    return figure


PLOTS: dict[str, Callable[[Sequence[Row]], Any]] = {
    "curves": plot_curves,
    "accuracy": plot_accuracy,
    "chains": plot_chains,
}
