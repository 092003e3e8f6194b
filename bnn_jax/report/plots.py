"""Pictures of a run: accuracies of a chain, label bank, features. Needs matplotlib."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnn_jax.errors import UserError

DOTS_PER_INCH = 160
GRAY = "#6b6b6b"
INK = "#222222"
BAR_COLOUR = "#0072b2"  # of the colour-blind safe palette by Okabe and Ito
MOST_PANELS = 3
# Accuracies of a record: name in the legend, line.
ACCURACIES: dict[str, tuple[str, dict[str, Any]]] = {
    "test_top1": ("test top-1", {"color": "#0072b2"}),
    "train_top1": ("train top-1", {"color": "#d55e00", "linestyle": (0, (4, 1.5))}),
    "test_top5": ("test top-5", {"color": "#56b4e9"}),
    "train_top5": ("train top-5", {"color": "#e69f00", "linestyle": (0, (4, 1.5))}),
    "validation_top1": ("validation top-1", {"color": "#009e73"}),
}
# A stage narrower than this share of the epoch axis gets a slanted label.
NARROW = 0.11
# Larger tables get no numbers and no name at every row.
MOST_NAMED_CLASSES = 20
DIVERGING = "PuOr_r"  # orange above 0, purple below: told apart without colour vision
# Classes: the colours of Okabe and Ito without yellow, which is too pale on white, and three of Paul Tol's.
CLASS_COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000"),
    *("#882255", "#999933", "#888888"),
)
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "p")
# t-SNE starts from this many principal components, as its authors did.
PRINCIPAL_COMPONENTS = 50
LEAST_IMAGES = 4


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
    figure = new_figure(width=11.0, height=4.4)
    curves, rungs = figure.subplots(1, 2, width_ratios=(1.9, 1.0))
    colours = ordered_colours(len(results))
    _draw_curves(curves, results, metrics_by_stage, colours)
    _draw_rungs(rungs, results, colours)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_accuracies(metrics_by_stage: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike) -> None:
    """Draws every accuracy a stage recorded per epoch, in training and held out, a panel for each stage.

    The legend names each one's highest value and its epoch (from 1).

    Args:
      metrics_by_stage: records of ``metrics.jsonl`` by stage name; at least one stage.
      path: PNG file to write.

    Raises:
      UserError: matplotlib is not installed.
    """
    columns = min(MOST_PANELS, len(metrics_by_stage))
    rows = math.ceil(len(metrics_by_stage) / columns)
    figure = new_figure(width=max(4.6 * columns, 6.4), height=4.0 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for index, (axis, (stage, records)) in enumerate(zip(axes, metrics_by_stage.items())):
        _draw_accuracies(axis, records, y_label="" if index % columns else "accuracy (%)")
        axis.set_title(stage, fontsize=10, color=INK)
    for axis in axes[len(metrics_by_stage) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_label_bank(
    bank: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike,
    *,
    title: str = "label bank",
    quantity: str = "mean logit",
) -> None:
    """Draws a bank of soft labels: a row for each true class, a column for each output.

    Args:
      bank: (K, K), float; a row of NaN is a class that has none.
      class_names: K names.
      path: PNG file to write.
      title: first line of the title.
      quantity: what a number of the bank is.

    Raises:
      UserError: matplotlib is not installed.
      ValueError: the bank is not square, or the names do not fit it.
    """
    bank = np.asarray(bank, float)
    if bank.ndim != 2 or bank.shape != (len(class_names),) * 2:
        raise ValueError(f"plot_label_bank: a bank of shape {bank.shape} and {len(class_names)} names do not fit")
    count = len(class_names)
    side = min(max(3.4 + 0.5 * count, 5.0), 10.5)
    figure = new_figure(width=side + 0.9, height=side)
    axis = figure.subplots()
    _draw_bank(figure, axis, bank, quantity=quantity)
    name_classes(axis, class_names)
    unknown = int(np.isnan(bank).all(axis=1).sum())
    note = f"; gray: no row for {unknown} of {count} classes" if unknown else ""
    axis.set_title(f"{title}\n{quantity} of the images classified right{note}", fontsize=10, color=INK)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_features(
    features: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike,
    *,
    title: str = "features",
    seed: int = 0,
) -> None:
    """Draws the classifier's input for a number of images in two dimensions (PCA, then t-SNE), coloured by class.

    Args:
      features: (N, D), float, N at least 4.
      labels: (N,), integers in [0, K).
      class_names: K names.
      path: PNG file to write.
      title: first line of the title.
      seed: seed of t-SNE.

    Raises:
      UserError: matplotlib is not installed, there are fewer than 4 images, or features that are not finite.
    """
    figure = new_figure(width=9.2, height=7.8)
    points, components = _embed(np.asarray(features, np.float64), seed=seed)
    axis = figure.subplots()
    labels, count = np.asarray(labels), len(class_names)
    groups: dict[int, np.ndarray] = {int(label): points[labels == label] for label in np.unique(labels)}
    size = 22 if len(labels) < 100 * len(groups) else 11
    for label, group in groups.items():
        style = {"color": _class_colour(label, count), "marker": MARKERS[label % len(MARKERS)]}
        axis.scatter(*group.T, **style, s=size, linewidths=0, alpha=0.8, label=class_names[label])
    if count <= MOST_NAMED_CLASSES:
        for label, group in groups.items():
            _label_class(axis, group, class_names[label])
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        axis.legend(frameon=False, fontsize=9, markerscale=7 / size**0.5, **place)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[["top", "right", "left", "bottom"]].set_color("#cccccc")
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel(
        f"input of the classifier ({np.shape(features)[1]:,} numbers) for {len(labels):,} test images;\n"
        f"{components} principal components, then t-SNE (seed {seed}): neighbours are alike, lengths carry no meaning",
        fontsize=9,
        color=GRAY,
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def new_figure(*, width: float, height: float) -> Any:
    """An empty figure (inches) that belongs to no window system and no global state."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise UserError("plots need matplotlib, which is not installed: pip install 'bnn_jax[report]'") from None
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def ordered_colours(count: int) -> list[Any]:
    """Colours from dark to light along the chain: ordered, and told apart without colour vision."""
    import matplotlib

    # The light end of the map is too pale on white.
    return [matplotlib.colormaps["viridis"](0.8 * i / max(count - 1, 1)) for i in range(count)]


def _values(records: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A value of each record, NaN (a gap in the curve) where it is missing."""
    return np.array([np.nan if record.get(name) is None else record[name] for record in records], float)


def curve(count: int) -> dict[str, Any]:
    """How a curve is drawn; few epochs are marked."""
    return {"linewidth": 1.6, "markersize": 3.5, "marker": "o" if count <= 15 else None}


def _draw_curves(
    axis: Any,
    results: Sequence[Mapping[str, Any]],
    metrics_by_stage: Mapping[str, Sequence[Mapping[str, Any]]],
    colours: Sequence[Any],
) -> None:
    """Test top-1 per epoch; the name of a stage stands above its part of the axis."""
    start, parts = 0, []
    for result, colour in zip(results, colours):
        heights = _values(metrics_by_stage.get(result["stage"], ()), "test_top1")
        if not len(heights):
            continue
        axis.plot(start + 1 + np.arange(len(heights)), heights, color=colour, **curve(len(heights)))
        parts.append((result["stage"], start, start + len(heights)))
        start += len(heights)
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
    style_axis(axis, x_label="epoch, stages laid end to end", y_label="test top-1 (%)")


def _draw_rungs(axis: Any, results: Sequence[Mapping[str, Any]], colours: Sequence[Any]) -> None:
    """Last epoch (filled, with its value) and best epoch (hollow) of every stage."""
    positions = np.arange(len(results))
    last, best = (_values(results, key) for key in ("last_top1", "best_top1"))
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
    axis.set_xticks(positions, [f"{b:.3g}" for b in bits] if by_bits else [str(r["stage"]) for r in results])
    axis.set_xlim(-0.5, len(results) - 0.5)
    # Room for the values below the lowest point and for the legend above the highest.
    axis.margins(y=0.28)
    style_axis(axis, x_label="nominal bits per weight" if by_bits else "stage", y_label="top-1 (%)")
    legend = axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.1)
    for handle in legend.legend_handles:
        handle.set_edgecolor(GRAY)
        if handle.get_facecolor().size:
            handle.set_facecolor(GRAY)


def _draw_accuracies(axis: Any, records: Sequence[Mapping[str, Any]], *, y_label: str) -> None:
    """Solid lines of held-out images, dashed ones of training images; top-5 lighter than top-1."""
    epochs = 1 + np.arange(len(records))
    for name, (label, style) in ACCURACIES.items():
        heights = _values(records, name)
        if not np.isfinite(heights).any():
            continue
        best = int(np.nanargmax(heights))
        text = f"{label}, {heights[best]:.2f} at {epochs[best]}"
        axis.plot(epochs, heights, label=text, **style, **curve(len(records)))
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    style_axis(axis, x_label="epoch", y_label=y_label)
    if axis.get_lines():
        axis.legend(frameon=False, fontsize=8, loc="lower right", title="highest value at epoch", title_fontsize=8)


def style_axis(axis: Any, *, x_label: str, y_label: str) -> None:
    """Labels, and no lines that carry no information."""
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_bank(figure: Any, axis: Any, bank: np.ndarray, *, quantity: str) -> None:
    """The coloured table; numbers in its cells where there is room for them."""
    import matplotlib

    finite = np.abs(bank[np.isfinite(bank)])
    limit = float(finite.max(initial=0.0)) or 1.0
    colours = matplotlib.colormaps[DIVERGING].with_extremes(bad="#bbbbbb")
    image = axis.imshow(bank, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, shrink=0.82, pad=0.02)
    bar.set_label(quantity, fontsize=9, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    if len(bank) > MOST_NAMED_CLASSES:
        return
    for (row, column), value in np.ndenumerate(bank):
        if np.isfinite(value):
            ink = "white" if abs(value) > 0.62 * limit else INK
            size = 8.5 if len(bank) <= 10 else 6.5
            weight = "bold" if row == column else "normal"
            # Adding 0 turns a rounded -0 into 0; the minus sign is that of the colour bar.
            number = f"{round(value, 1) + 0.0:.1f}".replace("-", "\N{MINUS SIGN}")
            axis.text(column, row, number, ha="center", va="center", color=ink, fontsize=size, weight=weight)


def name_classes(axis: Any, class_names: Sequence[str]) -> None:
    """Names at rows and columns; of many classes only some numbers."""
    if len(class_names) <= MOST_NAMED_CLASSES:
        slanted = max(map(len, class_names)) > 2
        rotation = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        axis.set_xticks(range(len(class_names)), class_names, fontsize=9, **rotation)
        axis.set_yticks(range(len(class_names)), class_names, fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("output of the network", color=INK)
    axis.set_ylabel("true class", color=INK)


def _embed(features: np.ndarray, *, seed: int) -> tuple[np.ndarray, int]:
    """Points (N, 2) of features (N, D), and the number of principal components in between."""
    if len(features) < LEAST_IMAGES or not np.isfinite(features).all():
        found = "some are not finite" if len(features) >= LEAST_IMAGES else f"there are {len(features)}"
        raise UserError(f"picture of the features: accepted are finite ones of {LEAST_IMAGES} images or more; {found}")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    components = min(PRINCIPAL_COMPONENTS, *features.shape)
    with np.errstate(invalid="ignore"):  # equal features have no variance to take shares of
        reduced = PCA(components, random_state=seed).fit_transform(features)
    # The usual 30 neighbours, fewer where there are few images; a start from the components needs them to differ.
    start = "pca" if reduced[:, 0].std() > 0 and components >= 2 else "random"
    neighbours = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=neighbours, init=start, random_state=seed).fit_transform(reduced), components


def _class_colour(label: int, count: int) -> Any:
    if count <= len(CLASS_COLOURS):
        return CLASS_COLOURS[label]
    import matplotlib

    return matplotlib.colormaps["turbo"](label / max(count - 1, 1))


def _label_class(axis: Any, points: np.ndarray, name: str) -> None:
    """The name of a class where its images stand closest together, so that it lies on a group and not between two."""
    from matplotlib.patheffects import withStroke

    distances = np.sort(np.linalg.norm(points[:, None] - points[None], axis=-1), axis=1)
    closest = points[np.argmin(distances[:, : 1 + len(points) // 5].mean(axis=1))]
    halo = [withStroke(linewidth=3, foreground="white", alpha=0.9)]
    axis.annotate(name, closest, ha="center", va="center", fontsize=10, color=INK, weight="bold", path_effects=halo)
