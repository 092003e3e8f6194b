"""Which classes a network mistakes for which: table and files of numbers, confusion matrix, the surest mistakes."""

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from bnn_jax.report import plots, tables
from bnn_jax.report.plots import INK

MOST_MISTAKES = 25
MOST_ROWS = 20  # of the table in the terminal
MOST_LETTERS = 16  # of a name above a picture


class Mistakes(NamedTuple):
    """The wrong answers that a network is surest of, the surest first.

    Attributes:
      images: int (M,), which images.
      labels: their true classes.
      predicted: what the network says.
      probabilities: how sure it is.
    """

    images: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class ClassResults:
    """What a network says of the test images, class by class.

    Attributes:
      names: K names of the classes.
      confusion: int (K, K), images by true class (row) and by output of the network (column).
    """

    names: Sequence[str]
    confusion: np.ndarray

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of each class its images, top-1 (recall) and precision in percent or None, and what it is mistaken for."""
        wrong = self.confusion * (1 - np.eye(len(self.names), dtype=int))
        return [
            {
                "class": name,
                "images": int(self.confusion[k].sum()),
                "top1": _share(self.confusion[k, k], self.confusion[k].sum()),
                "precision": _share(self.confusion[k, k], self.confusion[:, k].sum()),
                "mistaken_for": self.names[int(wrong[k].argmax())] if wrong[k].any() else None,
                "times": int(wrong[k].max()),
            }
            for k, name in enumerate(self.names)
        ]


def _share(part: int, whole: int) -> float | None:
    return 100.0 * int(part) / int(whole) if whole else None


def class_results(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> ClassResults:
    """Counts the outputs of a network, (N, K), for images of some labels, (N,)."""
    pairs = labels.astype(np.int64) * len(names) + logits.argmax(axis=1)
    return ClassResults(names, np.bincount(pairs, minlength=len(names) ** 2).reshape(len(names), -1))


def surest_mistakes(logits: np.ndarray, labels: np.ndarray) -> Mistakes:
    """The images, ``MOST_MISTAKES`` at most, whose wrong output has the highest probability."""
    logits = logits.astype(np.float64)
    predicted, highest = logits.argmax(axis=1), logits.max(axis=1)
    probabilities = 1.0 / np.exp(logits - highest[:, None]).sum(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    images = wrong[np.argsort(-probabilities[wrong], kind="stable")][:MOST_MISTAKES]
    return Mistakes(images, labels[images], predicted[images], probabilities[images])


def write_numbers(results: ClassResults, folder: Path) -> list[Path]:
    """Writes ``classes.csv``, a row for each class, and ``confusion.csv``; returns their paths."""
    rows = results.rows
    table = [[*results.rows[0]], *([*row.values()] for row in rows)]
    matrix = [["true class", *results.names], *([n, *row] for n, row in zip(results.names, results.confusion.tolist()))]
    paths = []
    for name, content in (("classes.csv", table), ("confusion.csv", matrix)):
        paths.append(folder / name)
        with paths[-1].open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(content)
    return paths


def classes_table(rows: Sequence[dict[str, Any]], *, stage: str) -> Table:
    """The classes with their accuracies; of many classes those that are recognised worst."""
    known = sorted((row for row in rows if row["top1"] is not None), key=lambda row: row["top1"])
    listed = rows if len(rows) <= MOST_ROWS else known[:MOST_ROWS]
    which = "" if len(listed) == len(rows) else f", the worst {len(listed)} of {len(rows)}"
    columns = ("class", "images", "top-1", "precision", "mostly mistaken for")
    table = tables.new_table(
        f"Classes of stage {stage}{which}", columns, left=(columns[0], columns[-1]), wrapped=columns
    )
    for row in listed:
        numbers = (tables.MISSING if row[key] is None else f"{row[key]:.2f} %" for key in ("top1", "precision"))
        other = tables.MISSING if row["mistaken_for"] is None else f"{row['mistaken_for']} ({row['times']:,})"
        table.add_row(row["class"], f"{row['images']:,}", *numbers, other)
    return table


def plot_confusion(results: ClassResults, path: Path, *, title: str) -> None:
    """Draws the confusion matrix: colours are shares of the true class, numbers are images.

    Raises:
      UserError: matplotlib is not installed.
    """
    counts, count = results.confusion, len(results.names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(3.4 + 0.5 * count, 5.0), 10.5)
    figure = plots.new_figure(width=side + 0.9, height=side)
    axis = figure.subplots()
    image = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, shrink=0.82, pad=0.02)
    bar.set_label("% of the images of the true class", fontsize=9, color=INK)
    bar.outline.set_visible(False)
    if count <= plots.MOST_NAMED_CLASSES:
        for (row, column), number in np.ndenumerate(counts):
            if number:
                colour = "white" if shares[row, column] > 0.55 else INK
                axis.text(column, row, f"{number:,}", ha="center", va="center", color=colour, fontsize=8)
    plots.name_classes(axis, results.names)
    axis.set_title(title, fontsize=10, color=INK)
    figure.savefig(path, dpi=plots.DOTS_PER_INCH)


def plot_mistakes(mistakes: Mistakes, images: np.ndarray, names: Sequence[str], path: Path, *, title: str) -> None:
    """Draws pictures that were mistaken, each with its true and its predicted class.

    Args:
      mistakes: M of them.
      images: uint8 (M, H, W, C).
      names: of the classes.
      path: PNG file to write.
      title: above all of them.

    Raises:
      UserError: matplotlib is not installed.
    """
    columns = min(5, max(len(images), 1))
    lines = math.ceil(max(len(images), 1) / columns)
    figure = plots.new_figure(width=max(2.0 * columns, 5.0), height=2.5 * lines + 0.8)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, pixels, label, predicted, sure in zip(axes, images, *mistakes[1:]):
        axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        text = f"{_short(names[int(label)])}\ntaken for {_short(names[int(predicted)])}, {sure:.0%}"
        axis.set_title(text, fontsize=8, color=INK)
    figure.suptitle(title if len(images) else f"{title}: there is none", fontsize=10, color=INK)
    figure.savefig(path, dpi=plots.DOTS_PER_INCH)


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 3]}..."
