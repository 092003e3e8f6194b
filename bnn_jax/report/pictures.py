"""Pictures that objectives and quantizers offer of a finished stage: label bank, features, codebooks."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from bnn_jax.objectives import Objective
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.quantizers.codebook import CodebookWeight
from bnn_jax.report import plots
from bnn_jax.report.plots import BAR_COLOUR, GRAY, INK

# Test images whose features are drawn: enough to see groups, few enough for a minute of t-SNE.
MOST_IMAGES = 2000
# The most used, or most changed, patterns are drawn, so many to a row.
TILES_PER_ROW = 16
MOST_TILE_ROWS = 2
MOST_LAYERS_IN_A_COLUMN = 8
# A tile's ground, its positions -1 and +1, and the same two where the sign is not the one the pattern started with.
TILE_COLOURS = ("#ffffff", "#f2f2f2", "#3b3b3b", "#fbd8a4", "#d55e00")
LEGEND = {"frameon": False, "fontsize": 7, "handlelength": 1.1, "borderaxespad": 0.1}
SIGN_COLOURS = {-1: "#e69f00", 1: BAR_COLOUR}


@dataclasses.dataclass(frozen=True)
class FinishedStage:
    """What a stage left that pictures are drawn from.

    Attributes:
      name: of the stage.
      objectives: its loss terms.
      objective_state: their states after the last epoch.
      features: gives what the classifier reads for the first ``MOST_IMAGES`` test images, (N, D), and their labels.
      class_names: names of the classes.
      variables: gives the network's variables before the first step and after the last epoch.
    """

    name: str
    objectives: tuple[Objective, ...]
    objective_state: Mapping[str, Any]
    features: Callable[[], tuple[np.ndarray, np.ndarray]]
    class_names: tuple[str, ...]
    variables: Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]]


def draw_label_bank(stage: FinishedStage, path: Path) -> None:
    """The mean outputs of each class that the stage ended with; a class without a row is left blank."""
    objective = next(term for term in stage.objectives if "label_bank" in term.pictures)
    state = stage.objective_state[objective.name]
    bank = np.where(np.asarray(state["known"])[:, None], np.asarray(state["bank"]), np.nan)
    quantity = "mean log-probability" if getattr(objective, "log_softmax", False) else "mean logit"
    title = f"label bank of stage {stage.name} after the last epoch"
    plots.plot_label_bank(bank, stage.class_names, path, title=title, quantity=quantity)


def draw_features(stage: FinishedStage, path: Path) -> None:
    """What the classifier reads, in two dimensions."""
    features, labels = stage.features()
    title = f"features of stage {stage.name} after the last epoch"
    plots.plot_features(features, labels, stage.class_names, path, title=title)


def draw_pattern_use(stage: FinishedStage, path: Path) -> None:
    """How unevenly the kernels of each layer use the patterns of its codebook, and the most used ones as 3x3 tiles."""
    title = f"use of the codebooks of stage {stage.name} after the last epoch"
    figure, charts = draw_codebooks(codebooks_of(*stage.variables()), _draw_use, title=title)
    charts[0].legend(loc="upper right", **LEGEND)
    charts[-1].set_xlabel("pattern, from the most used", fontsize=8, color=INK)
    figure.savefig(path, dpi=plots.DOTS_PER_INCH)


def draw_pattern_motion(stage: FinishedStage, path: Path) -> None:
    """How far training moved the values behind the patterns of each layer, and the patterns it changed."""
    title = f"motion of the codebooks in stage {stage.name}, from its start to after the last epoch"
    figure, charts = draw_codebooks(codebooks_of(*stage.variables()), _draw_motion, title=title)
    charts[0].legend(loc="upper center", **LEGEND)
    charts[-1].set_xlabel("trained value", fontsize=8, color=INK)
    figure.savefig(path, dpi=plots.DOTS_PER_INCH)


PICTURES: dict[str, Callable[[FinishedStage, Path], None]] = {
    "label_bank": draw_label_bank,
    "features": draw_features,
    "pattern_use": draw_pattern_use,
    "pattern_motion": draw_pattern_motion,
}


def offered(parts: Iterable[Any]) -> tuple[str, ...]:
    """Names of the pictures a stage made of these parts can show, in the order of ``PICTURES``.

    Args:
      parts: its objectives and weight quantizers; each has ``pictures``, a set of names.
    """
    names = frozenset().union(*(part.pictures for part in parts))
    return tuple(name for name in PICTURES if name in names)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """The codebook of one layer, and how its kernels use it.

    Attributes:
      patterns: (n, 9), -1 and +1, the patterns in use, 3x3 row by row.
      counts: (n,) int, kernels that use each pattern.
      free_counts: (at most 512,) int, kernels by the nearest of all patterns, as an ordinary binary network would use
        them; without patterns that no kernel is nearest to.
      values: (n, 9) float, the trained values behind the patterns.
      initial: (n, 9), -1 and +1, the patterns the stage started from.
    """

    patterns: np.ndarray
    counts: np.ndarray
    free_counts: np.ndarray
    values: np.ndarray
    initial: np.ndarray

    @property
    def flipped(self) -> np.ndarray:
        """(n, 9) bool, where a pattern's sign is not the one it started with."""
        return np.asarray(self.patterns != self.initial)


def codebooks_of(initial: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Codebook]:
    """Codebook and its use of every layer that has one, by path of the layer ('layer1_0/conv'), in natural order.

    Args:
      initial: variables of a network as its stage began.
      last: its trained variables.
    """
    before, params = (
        flax.traverse_util.flatten_dict(variables.get("params", {}), sep="/") for variables in (initial, last)
    )
    memory = flax.traverse_util.flatten_dict(last.get("quant_state", {}), sep="/")
    # A codebook's own path names the quantizer, and the one around it, too.
    paths = {path.partition("/weight_quantizer")[0]: path for path in params if path.endswith("/codebook")}
    return {
        layer: _codebook(
            np.asarray(params[f"{layer}/kernel"]),
            np.asarray(params[path]),
            memory=np.asarray(memory[path.removesuffix("codebook") + "memory"]),
            initial=np.asarray(before[path]),
        )
        for layer, path in sorted(paths.items())
    }


def _codebook(kernel: np.ndarray, values: np.ndarray, *, memory: np.ndarray, initial: np.ndarray) -> Codebook:
    quantizer = CodebookWeight(tau=len(values).bit_length() - 1)
    variables = {"params": {"codebook": values}, "quant_state": {"memory": memory}}
    encoded: Any = quantizer.apply(variables, kernel, QuantContext(), method="encode")
    signs = kernel.reshape(9, -1) > 0
    return Codebook(
        patterns=np.asarray(encoded.levels, int),
        counts=np.bincount(np.ravel(encoded.indices), minlength=len(values)),
        free_counts=np.unique(signs, axis=1, return_counts=True)[1],
        values=values,
        initial=np.where(initial > 0, 1, -1),
    )


def draw_codebooks(layers: Mapping[str, Codebook], draw: Callable[..., None], *, title: str) -> tuple[Any, list[Any]]:
    """A small chart and a wide place for tiles for each layer, which ``draw`` fills; returns the figure and the charts.

    Raises:
      UserError: matplotlib is not installed.
      ValueError: there is no layer.
    """
    if not layers:
        raise ValueError(f"{title}: no layer has a codebook")
    columns = 1 if len(layers) <= MOST_LAYERS_IN_A_COLUMN else 2
    height = math.ceil(len(layers) / columns)
    figure = plots.new_figure(width=9.6 if columns == 1 else 16.0, height=1.25 * height + 0.9)
    axes = figure.subplots(height, 2 * columns, squeeze=False, width_ratios=(1.0, 2.6) * columns)
    # Down the first column of layers, then down the second.
    rows = [pair for column in range(columns) for pair in axes[:, 2 * column : 2 * column + 2]]
    for (chart, tiles), (name, layer) in zip(rows, layers.items()):
        draw(chart, tiles, layer)
        plots.style_axis(chart, x_label="", y_label="")
        chart.set_title(name, fontsize=8, loc="left", color=INK, pad=3)
        chart.tick_params(labelsize=7)
    for axis in (axis for pair in rows[len(layers) :] for axis in pair):
        axis.set_visible(False)
    key = "dark: +1, light: \N{MINUS SIGN}1; orange: flipped since the stage began"
    figure.suptitle(f"{title}\n{key}", fontsize=10, color=INK)
    return figure, [chart for chart, _ in rows[: len(layers)]]


def _draw_use(chart: Any, tiles: Any, layer: Codebook) -> None:
    """Shares of the kernels by rank: of the codebook, and of all 512 patterns if all were there."""
    for counts, colour, label in (
        (layer.free_counts, GRAY, "all 512 patterns"),
        (layer.counts, BAR_COLOUR, "codebook"),
    ):
        shares = 100 * np.sort(counts[counts > 0])[::-1] / max(counts.sum(), 1)
        chart.step(np.arange(1, len(shares) + 1), shares, where="mid", color=colour, linewidth=1.3, label=label)
    chart.set_xscale("log", base=2)
    chart.set_yscale("log")
    chart.set_xlim(1, 512)
    chart.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    chart.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    chart.yaxis.set_minor_formatter("")
    order = np.argsort(-layer.counts, kind="stable")
    shown = draw_tiles(tiles, layer.patterns[order], layer.flipped[order])
    share = layer.counts[order][:shown].sum() / max(layer.counts.sum(), 1)
    used = np.count_nonzero(layer.counts)
    _caption(tiles, f"the {shown} most used of {len(layer.counts)}: {share:.0%} of the kernels; {used} in use")


def _draw_motion(chart: Any, tiles: Any, layer: Codebook) -> None:
    """Histogram of the trained values, apart for those that started at -1 and at +1."""
    reach = max(1.05, float(np.abs(layer.values).max(initial=0.0)))
    for sign, colour in SIGN_COLOURS.items():
        label = f"started at {sign:+d}".replace("-", "\N{MINUS SIGN}")
        values = layer.values[layer.initial == sign]
        chart.hist(values, np.linspace(-reach, reach, 61), color=colour, alpha=0.75, label=label)
    chart.axvline(0, color=INK, linewidth=0.7)
    chart.set_yscale("symlog", linthresh=1)
    chart.set_yticks([])
    flips = layer.flipped.sum(axis=1)
    order = np.argsort(-flips, kind="stable")[: np.count_nonzero(flips)]
    shown = draw_tiles(tiles, layer.patterns[order], layer.flipped[order])
    which = "all" if shown == len(order) else f"the {shown} most changed"
    text = f"{len(order)} of {len(flips)} patterns changed, {layer.flipped.mean():.1%} of the signs"
    _caption(tiles, f"{text}; {which} of them:" if shown else "no pattern changed")


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
    colours = ListedColormap(TILE_COLOURS)
    axis.imshow(image, cmap=colours, vmin=-1, vmax=len(TILE_COLOURS) - 2, interpolation="nearest")
    return shown


def _caption(axis: Any, text: str) -> None:
    axis.set_title(text, fontsize=8, loc="left", color=INK, pad=3)
