"""Pictures of codebooks of 3x3 patterns: which patterns the kernels use, and how refinement moved them."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from bnn_jax.report.plots import BAR_COLOUR, DOTS_PER_INCH, GRAY, INK, new_figure, style_axis

# The most used patterns are drawn, so many to a row.
TILES_PER_ROW = 16
MOST_LAYERS_IN_A_COLUMN = 8
MOST_TILE_ROWS = 2
# A tile's positions: -1, +1, and the same two where the sign is not the one the pattern started with.
TILE_COLOURS = ("#f2f2f2", "#3b3b3b", "#fbd8a4", "#d55e00")
GROUND = "#ffffff"
SIGN_COLOURS = {-1: "#e69f00", 1: BAR_COLOUR}


@dataclasses.dataclass(frozen=True)
class CodebookUse:
    """The codebook of one layer, and how its kernels use it.

    Attributes:
      patterns: (n, 9), -1 and +1, the patterns in use, 3x3 row by row.
      counts: (n,) int, kernels that use each pattern.
      free_counts: (512,) int, kernels by the nearest of all patterns, as an ordinary binary network would use them.
      codebook: (n, 9) float, the trained values behind the patterns.
      initial: (n, 9), -1 and +1, the patterns the stage started from.
    """

    patterns: np.ndarray
    counts: np.ndarray
    free_counts: np.ndarray
    codebook: np.ndarray
    initial: np.ndarray

    @property
    def flipped(self) -> np.ndarray:
        """(n, 9) bool, where a pattern's sign is not the one it started with."""
        return np.asarray(self.patterns != self.initial)


def plot_pattern_use(layers: Mapping[str, CodebookUse], path: str | os.PathLike, *, title: str) -> None:
    """Draws, for every layer, how unevenly its kernels use the patterns, and the most used patterns as 3x3 tiles.

    Args:
      layers: at least one layer by name.
      path: PNG file to write.
      title: title of the picture.

    Raises:
      UserError: matplotlib is not installed.
      ValueError: there is no layer.
    """
    figure, rows = _rows(layers, "plot_pattern_use")
    for (name, layer), (curve, tiles) in zip(layers.items(), rows):
        _draw_use(curve, name, layer, with_legend=curve is rows[0][0])
        order = np.argsort(-layer.counts, kind="stable")
        shown = draw_tiles(tiles, layer.patterns[order], layer.flipped[order])
        share = layer.counts[order][:shown].sum() / max(layer.counts.sum(), 1)
        used = np.count_nonzero(layer.counts)
        _caption(tiles, f"the {shown} most used of {len(layer.counts)}: {share:.0%} of the kernels; {used} in use")
    rows[-1][0].set_xlabel("pattern, from the most used", fontsize=8, color=INK)
    _finish(figure, path, title)


def plot_pattern_motion(layers: Mapping[str, CodebookUse], path: str | os.PathLike, *, title: str) -> None:
    """Draws, for every layer, how far refinement moved the values behind the patterns, and the patterns it changed.

    Args:
      layers: at least one layer by name.
      path: PNG file to write.
      title: title of the picture.

    Raises:
      UserError: matplotlib is not installed.
      ValueError: there is no layer.
    """
    figure, rows = _rows(layers, "plot_pattern_motion")
    for (name, layer), (histogram, tiles) in zip(layers.items(), rows):
        _draw_values(histogram, name, layer, with_legend=histogram is rows[0][0])
        changed = np.asarray(layer.flipped.any(axis=1))
        order = np.argsort(-layer.flipped.sum(axis=1), kind="stable")[: np.count_nonzero(changed)]
        shown = draw_tiles(tiles, layer.patterns[order], layer.flipped[order])
        which = "all" if shown == len(order) else f"the {shown} most changed"
        text = f"{len(order)} of {len(changed)} patterns changed, {layer.flipped.mean():.1%} of the signs"
        _caption(tiles, f"{text}; {which} of them:" if shown else "no pattern changed")
    rows[-1][0].set_xlabel("trained value", fontsize=8, color=INK)
    _finish(figure, path, title)


def draw_tiles(axis: Any, patterns: np.ndarray, flipped: np.ndarray) -> int:
    """Draws patterns as 3x3 tiles, row by row; returns how many there was room for.

    Args:
      axis: matplotlib axis.
      patterns: (n, 9), -1 and +1.
      flipped: (n, 9) bool, positions in the second pair of colours.
    """
    from matplotlib.colors import ListedColormap

    axis.set_axis_off()
    shown = min(len(patterns), TILES_PER_ROW * MOST_TILE_ROWS)
    image = np.full((4 * MOST_TILE_ROWS - 1, 4 * TILES_PER_ROW - 1), -1)
    for index in range(shown):
        row, column = divmod(index, TILES_PER_ROW)
        tile = (patterns[index] > 0) + 2 * flipped[index].astype(int)
        image[4 * row : 4 * row + 3, 4 * column : 4 * column + 3] = tile.reshape(3, 3)
    colours = ListedColormap((GROUND, *TILE_COLOURS))
    axis.imshow(image, cmap=colours, vmin=-1, vmax=len(TILE_COLOURS) - 1, interpolation="nearest")
    return shown


def _rows(layers: Mapping[str, CodebookUse], function: str) -> tuple[Any, Any]:
    """A figure with a small chart and a wide place for tiles for each layer, and these pairs of axes."""
    if not layers:
        raise ValueError(f"{function}: no layer has a codebook")
    columns = 1 if len(layers) <= MOST_LAYERS_IN_A_COLUMN else 2
    height = math.ceil(len(layers) / columns)
    figure = new_figure(width=9.6 if columns == 1 else 16.0, height=1.25 * height + 0.9)
    axes = figure.subplots(height, 2 * columns, squeeze=False, width_ratios=(1.0, 2.6) * columns)
    # Down the first column of layers, then down the second.
    rows = [pair for column in range(columns) for pair in axes[:, 2 * column : 2 * column + 2]]
    for pair in rows[len(layers) :]:
        for axis in pair:
            axis.set_visible(False)
    return figure, rows[: len(layers)]


def _draw_use(axis: Any, name: str, layer: CodebookUse, *, with_legend: bool) -> None:
    """Shares of the kernels by rank: of the codebook, and of all 512 patterns if all were there."""
    for counts, colour, label in (
        (layer.free_counts, GRAY, "all 512 patterns"),
        (layer.counts, BAR_COLOUR, "codebook"),
    ):
        shares = 100 * np.sort(counts)[::-1] / max(counts.sum(), 1)
        shares = shares[shares > 0]
        axis.step(np.arange(1, len(shares) + 1), shares, where="mid", color=colour, linewidth=1.3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlim(1, 512)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axis.yaxis.set_minor_formatter("")
    _style_small(axis, name)
    if with_legend:
        axis.legend(frameon=False, fontsize=7, loc="upper right", handlelength=1.2, borderaxespad=0.1)


def _draw_values(axis: Any, name: str, layer: CodebookUse, *, with_legend: bool) -> None:
    """Histogram of the trained values, apart for those that started at -1 and at +1."""
    reach = max(1.05, float(np.abs(layer.codebook).max(initial=0.0)))
    edges = np.linspace(-reach, reach, 61)
    for sign, colour in SIGN_COLOURS.items():
        values = layer.codebook[layer.initial == sign]
        label = f"started at {sign:+d}".replace("-", "\N{MINUS SIGN}")
        axis.hist(values, edges, color=colour, alpha=0.75, label=label)
    axis.axvline(0, color=INK, linewidth=0.7)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_yticks([])
    _style_small(axis, name)
    if with_legend:
        axis.legend(frameon=False, fontsize=7, loc="upper center", handlelength=1.0, borderaxespad=0.1)


def _style_small(axis: Any, name: str) -> None:
    style_axis(axis, x_label="", y_label="")
    axis.set_title(name, fontsize=8, loc="left", color=INK, pad=3)
    axis.tick_params(labelsize=7)


def _caption(axis: Any, text: str) -> None:
    axis.set_title(text, fontsize=8, loc="left", color=INK, pad=3)


def _finish(figure: Any, path: str | os.PathLike, title: str) -> None:
    legend = "dark: +1, light: \N{MINUS SIGN}1; orange: flipped since the stage began"
    figure.suptitle(f"{title}\n{legend}", fontsize=10, color=INK)
    figure.savefig(path, dpi=DOTS_PER_INCH)
