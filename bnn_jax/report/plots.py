"""Pictures of a run: accuracy along a chain of stages, and the levels the weights take. Needs matplotlib."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnn_jax.errors import UserError
from bnn_jax.report.levels import LevelCounts

DOTS_PER_INCH = 160
GRAY = "#6b6b6b"
INK = "#222222"
BAR_COLOUR = "#0072b2"  # of the colour-blind safe palette by Okabe and Ito
CURVE_WIDTH = 1.6
MOST_COLUMNS = 6
# A stage narrower than this share of the epoch axis gets a slanted label.
NARROW = 0.11


def plot_chain(
    results: Sequence[Mapping[str, Any]],
    metrics_by_stage: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike,
) -> None:
    """Draws a chain: test top-1 per epoch, stages laid end to end, beside the last and the best epoch of every stage.

    Args:
      results: contents of the stages' ``result.json``, in the order of the chain; values that are missing are left out.
      metrics_by_stage: records of ``metrics.jsonl`` by stage name.
      path: PNG file to write.

    Raises:
      UserError: matplotlib is not installed.
    """
    figure = _new_figure(width=11.0, height=4.4)
    curves, rungs = figure.subplots(1, 2, width_ratios=(1.9, 1.0))
    colours = _colours(len(results))
    _draw_curves(curves, results, metrics_by_stage, colours)
    _draw_rungs(rungs, results, colours)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_weights(counts: Mapping[str, LevelCounts], path: str | os.PathLike) -> None:
    """Draws, for every quantized layer, the share of its weights on each level.

    Args:
      counts: from ``levels.level_counts``; at least one layer.
      path: PNG file to write.

    Raises:
      UserError: matplotlib is not installed.
      ValueError: there is no layer.
    """
    if not counts:
        raise ValueError("plot_weights: no layer has quantized weights")
    columns = min(MOST_COLUMNS, len(counts))
    rows = math.ceil(len(counts) / columns)
    figure = _new_figure(width=max(2.1 * columns, 4.2), height=1.7 * rows + 0.8)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis, (name, layer) in zip(axes, counts.items()):
        _draw_levels(axis, name, layer)
    for axis in axes[len(counts) :]:
        axis.set_visible(False)
    figure.supxlabel("level (times the scale)", fontsize=10)
    figure.supylabel("share of weights (%)", fontsize=10)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _new_figure(*, width: float, height: float) -> Any:
    """An empty figure (inches) that belongs to no window system and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib, which is not installed: pip install 'bnn_jax[report]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _colours(count: int) -> list[Any]:
    """Colours from dark to light along the chain: ordered, and told apart without colour vision."""
    import matplotlib

    # The light end of the map is too pale on white.
    return [matplotlib.colormaps["viridis"](0.8 * i / max(count - 1, 1)) for i in range(count)]


def _draw_curves(
    axis: Any,
    results: Sequence[Mapping[str, Any]],
    metrics_by_stage: Mapping[str, Sequence[Mapping[str, Any]]],
    colours: Sequence[Any],
) -> None:
    """Test top-1 per epoch; the name of a stage stands above its part of the axis."""
    start, parts = 0, []
    for result, colour in zip(results, colours):
        values = [record.get("test_top1") for record in metrics_by_stage.get(result["stage"], ())]
        if not values:
            continue
        # A gap for an epoch without a value; epochs count from 1.
        heights = [np.nan if value is None else value for value in values]
        epochs = start + 1 + np.arange(len(values))
        marker = "o" if len(values) <= 15 else None
        axis.plot(epochs, heights, color=colour, linewidth=CURVE_WIDTH, marker=marker, markersize=3.5)
        parts.append((result["stage"], start, start + len(values)))
        start += len(values)
    for _, begin, _ in parts[1:]:
        axis.axvline(begin + 0.5, color=GRAY, linewidth=0.6, linestyle=(0, (2, 3)))
    slanted = any((end - begin) / start < NARROW for _, begin, end in parts)
    for name, begin, end in parts:
        axis.annotate(
            name,
            ((begin + end + 1) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            color=INK,
            fontsize=9,
            ha="left" if slanted else "center",
            rotation=40 if slanted else 0,
            rotation_mode="anchor",
        )
    if start:
        axis.set_xlim(0.5, start + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _style(axis, x_label="epoch, stages laid end to end", y_label="test top-1 (%)")


def _draw_rungs(axis: Any, results: Sequence[Mapping[str, Any]], colours: Sequence[Any]) -> None:
    """Last epoch (filled, with its value) and best epoch (hollow) of every stage."""
    positions = np.arange(len(results))
    last, best = (
        np.array([np.nan if result.get(key) is None else result[key] for result in results], float)
        for key in ("last_top1", "best_top1")
    )
    selections = "/".join(sorted({str(result["selection"]) for result in results if result.get("selection")}))
    axis.plot(positions, last, color=GRAY, linewidth=1.0, zorder=1)
    axis.scatter(positions, last, s=46, color=list(colours), zorder=3, label="last epoch")
    axis.scatter(
        positions,
        best,
        s=100,
        facecolors="none",
        edgecolors=list(colours),
        linewidths=1.4,
        zorder=2,
        label=f"best epoch, chosen on {selections} images" if selections else "best epoch",
    )
    for x, value in zip(positions[np.isfinite(last)], last[np.isfinite(last)]):
        # On a white ground, since the line may pass below.
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        place = {"xytext": (0, -9), "textcoords": "offset points", "ha": "center", "va": "top"}
        axis.annotate(f"{value:.1f}", (x, value), **place, fontsize=9, color=INK, bbox=ground, zorder=2)
    bits = [result.get("bits") for result in results]
    by_bits = None not in bits and len(set(bits)) == len(bits)
    axis.set_xticks(positions, [f"{b:g}" for b in bits] if by_bits else [str(r["stage"]) for r in results])
    axis.set_xlim(-0.5, len(results) - 0.5)
    # Room for the values below the lowest point and for the legend above the highest.
    axis.margins(y=0.28)
    _style(axis, x_label="nominal bits per weight" if by_bits else "stage", y_label="top-1 (%)")
    legend = axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.1)
    for handle in legend.legend_handles:
        handle.set_edgecolor(GRAY)
        if handle.get_facecolor().size:
            handle.set_facecolor(GRAY)


def _draw_levels(axis: Any, name: str, layer: LevelCounts) -> None:
    """Share of the weights of one layer on each of its levels."""
    shares = 100 * layer.counts / max(layer.counts.sum(), 1)
    width = 0.8 * float(np.min(np.diff(layer.levels), initial=np.inf)) if layer.levels.size > 1 else 0.8
    axis.bar(layer.levels, shares, width=width, color=BAR_COLOUR)
    if layer.levels.size <= 4:
        axis.set_xticks(layer.levels)
    axis.set_title(f"{name}: {np.count_nonzero(layer.counts)} of {layer.levels.size} levels", fontsize=8)
    _style(axis, x_label="", y_label="")
    axis.tick_params(labelsize=7)


def _style(axis: Any, *, x_label: str, y_label: str) -> None:
    """Labels, and no lines that carry no information."""
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
