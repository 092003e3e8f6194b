"""Pictures are written for complete and for sparse results, and say what is missing without matplotlib."""

import pathlib
import sys

import numpy as np
import PIL.Image
import pytest

from bnn_jax.errors import UserError
from bnn_jax.report import plots

RESULTS = [
    {"stage": "w32a32", "bits": 32, "last_top1": 91.0, "best_top1": 91.5, "selection": "test"},
    {"stage": "w1a1", "bits": 1, "last_top1": 80.0, "best_top1": 82.0, "selection": "test"},
]
METRICS = {
    "w32a32": [{"test_top1": 60.0}, {"test_top1": 91.0}],
    "w1a1": [{"test_top1": 82.0}, {"test_top1": None}, {"test_top1": 80.0}],
}


@pytest.fixture
def drawn(monkeypatch):
    """Figures made during the test."""
    figures, make = [], plots.new_figure

    def remember(**size):
        figures.append(make(**size))
        return figures[-1]

    monkeypatch.setattr(plots, "new_figure", remember)
    return figures


def test_the_curves_of_a_chain_lie_end_to_end(tmp_path: pathlib.Path, drawn) -> None:
    plots.plot_chain(RESULTS, METRICS, tmp_path / "chain.png")
    curves, rungs = drawn[0].axes
    first, second = curves.get_lines()[:2]
    assert first.get_xdata().tolist() == [1, 2]
    assert second.get_xdata().tolist() == [3, 4, 5]
    np.testing.assert_array_equal(second.get_ydata(), [82.0, np.nan, 80.0])
    assert [text.get_text() for text in curves.texts] == ["w32a32", "w1a1"]
    assert [label.get_text() for label in rungs.get_xticklabels()] == ["32", "1"]
    assert "best epoch, chosen on test images" in [text.get_text() for text in rungs.get_legend().get_texts()]
    with PIL.Image.open(tmp_path / "chain.png") as image:
        assert image.size == (1760, 704)


def test_bits_that_are_no_whole_number_are_rounded(tmp_path: pathlib.Path, drawn) -> None:
    plots.plot_chain([{**RESULTS[0], "bits": 2.584962500721156}, RESULTS[1]], METRICS, tmp_path / "chain.png")
    assert [label.get_text() for label in drawn[0].axes[1].get_xticklabels()] == ["2.58", "1"]


def test_every_recorded_accuracy_has_a_line_and_its_highest_value_in_the_legend(tmp_path: pathlib.Path, drawn) -> None:
    search = [
        {"test_top1": 40.0, "train_top1": 30.0, "test_top5": 90.0, "train_top5": 80.0},
        {"test_top1": 60.5, "train_top1": 50.0, "test_top5": 95.0, "train_top5": None},
        {"test_top1": 55.0, "train_top1": 70.25, "test_top5": 94.0, "train_top5": 99.0},
    ]
    plots.plot_accuracies({"search": search, "other": search[:1], "empty": []}, tmp_path / "accuracies.png")
    first, second, empty = drawn[0].axes
    assert [line.get_label() for line in first.get_lines()] == [
        "test top-1, 60.50 at 2",
        "train top-1, 70.25 at 3",
        "test top-5, 95.00 at 2",
        "train top-5, 99.00 at 3",
    ]
    np.testing.assert_array_equal(first.get_lines()[3].get_ydata(), [80.0, np.nan, 99.0])
    assert [len(axis.get_lines()) for axis in (second, empty)] == [4, 0]
    assert [axis.get_title() for axis in (first, second, empty)] == ["search", "other", "empty"]
    with PIL.Image.open(tmp_path / "accuracies.png") as image:
        assert min(image.size) > 500


def test_many_stages_stand_in_rows(tmp_path: pathlib.Path, drawn) -> None:
    plots.plot_accuracies({str(stage): METRICS["w1a1"] for stage in range(5)}, tmp_path / "accuracies.png")
    axes = drawn[0].axes
    assert [axis.get_visible() for axis in axes] == [True] * 5 + [False]
    assert [axis.get_ylabel() for axis in axes[:5]] == ["accuracy (%)", "", "", "accuracy (%)", ""]


def test_stages_of_equal_bits_are_told_apart_by_name(tmp_path: pathlib.Path, drawn) -> None:
    plots.plot_chain([{**RESULTS[0], "bits": 1}, RESULTS[1]], METRICS, tmp_path / "chain.png")
    assert [label.get_text() for label in drawn[0].axes[1].get_xticklabels()] == ["w32a32", "w1a1"]


def test_sparse_results_are_drawn_too(tmp_path: pathlib.Path) -> None:
    plots.plot_chain([{"stage": "only"}], {}, tmp_path / "chain.png")
    assert (tmp_path / "chain.png").stat().st_size > 0


def test_without_matplotlib_the_error_names_the_extra(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'bnn_jax\[report\]'"):
        plots.plot_chain(RESULTS, METRICS, tmp_path / "chain.png")


# ---- label bank


def bank_of(count: int) -> np.ndarray:
    return np.random.RandomState(0).normal(size=(count, count)) + 5 * np.eye(count)


def test_a_label_bank_is_drawn_with_its_numbers_and_names(tmp_path: pathlib.Path, drawn) -> None:
    bank = np.array([[2.0, -0.04], [-1.25, 3.0]])
    plots.plot_label_bank(bank, ("cat", "dog"), tmp_path / "bank.png", title="bank of stage x", quantity="mean logit")
    axis, bar = drawn[0].axes
    # A rounded -0 is 0, ties go to even, and the minus sign is the typographic one.
    assert [text.get_text() for text in axis.texts] == ["2.0", "0.0", "\N{MINUS SIGN}1.2", "3.0"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cat", "dog"]
    assert axis.get_title() == "bank of stage x\nmean logit of the images classified right"
    assert bar.get_ylabel() == "mean logit"
    # Rows are true classes, and the colours are symmetric around 0.
    (image,) = axis.get_images()
    np.testing.assert_array_equal(image.get_array(), bank)
    assert image.get_clim() == (-3.0, 3.0)
    with PIL.Image.open(tmp_path / "bank.png") as picture:
        assert min(picture.size) > 700


def test_a_class_without_a_row_is_gray_and_counted(tmp_path: pathlib.Path, drawn) -> None:
    bank = bank_of(3)
    bank[1] = np.nan
    plots.plot_label_bank(bank, ("a", "b", "c"), tmp_path / "bank.png")
    axis = drawn[0].axes[0]
    assert len(axis.texts) == 6
    assert axis.get_title().endswith("; gray: no row for 1 of 3 classes")
    (image,) = axis.get_images()
    np.testing.assert_allclose(image.cmap(np.ma.masked_invalid([np.nan]))[0][:3], (0xBB / 255,) * 3)


@pytest.mark.parametrize("bank", [np.zeros((3, 3)), np.full((3, 3), np.nan)], ids=["zeros", "nan"])
def test_a_bank_without_contrast_is_drawn_too(tmp_path: pathlib.Path, bank) -> None:
    plots.plot_label_bank(bank, ("a", "b", "c"), tmp_path / "bank.png")
    assert (tmp_path / "bank.png").stat().st_size > 0


def test_a_large_bank_has_no_numbers_in_its_cells(tmp_path: pathlib.Path, drawn) -> None:
    plots.plot_label_bank(bank_of(21), [f"class {i}" for i in range(21)], tmp_path / "bank.png")
    axis = drawn[0].axes[0]
    assert not list(axis.texts)
    assert "class 3" not in [label.get_text() for label in axis.get_xticklabels()]


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (2,)])
def test_a_bank_that_does_not_fit_its_names_is_refused(tmp_path: pathlib.Path, shape) -> None:
    with pytest.raises(ValueError, match="and 2 names do not fit"):
        plots.plot_label_bank(np.zeros(shape), ("a", "b"), tmp_path / "bank.png")


# ---- features


def groups(per_class: int, classes: int = 3, dimensions: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Features in groups far apart, and their classes."""
    random = np.random.RandomState(0)
    labels = np.repeat(np.arange(classes), per_class)
    return random.normal(size=(len(labels), dimensions)) + 40 * random.normal(size=(classes, dimensions))[
        labels
    ], labels


def points_of(axis) -> list[np.ndarray]:
    return [np.asarray(collection.get_offsets()) for collection in axis.collections]


def test_features_of_a_class_lie_together_and_carry_its_name(tmp_path: pathlib.Path, drawn) -> None:
    features, labels = groups(20)
    plots.plot_features(features, labels, ("cat", "dog", "owl"), tmp_path / "features.png", title="features of x")
    (axis,) = drawn[0].axes
    points = points_of(axis)
    assert [len(p) for p in points] == [20, 20, 20]
    centres = np.stack([p.mean(axis=0) for p in points])
    widths = [np.linalg.norm(p - c, axis=1).mean() for p, c in zip(points, centres, strict=True)]
    apart = min(np.linalg.norm(centres[i] - centres[j]) for i in range(3) for j in range(i))
    assert apart > 3 * max(widths)
    # The name stands on an image of its own class.
    for text, p in zip(axis.texts, points, strict=True):
        assert np.linalg.norm(p - np.asarray(text.xy), axis=1).min() == 0
    assert [text.get_text() for text in axis.texts] == ["cat", "dog", "owl"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["cat", "dog", "owl"]
    assert len({tuple(collection.get_facecolor()[0]) for collection in axis.collections}) == 3
    caption = axis.get_xlabel()
    assert "(20 numbers) for 60 test images" in caption and "20 principal components, then t-SNE (seed 0)" in caption
    assert axis.get_title() == "features of x"


def test_the_same_features_give_the_same_picture(tmp_path: pathlib.Path, drawn) -> None:
    features, labels = groups(8)
    for name in ("one", "two"):
        plots.plot_features(features, labels, ("a", "b", "c"), tmp_path / name, seed=1)
    for one, two in zip(*(points_of(figure.axes[0]) for figure in drawn), strict=True):
        np.testing.assert_array_equal(one, two)


def test_more_than_fifty_dimensions_are_reduced_to_fifty_first(tmp_path: pathlib.Path, drawn) -> None:
    plots.plot_features(*groups(20, dimensions=64), ("a", "b", "c"), tmp_path / "features.png")
    assert "(64 numbers)" in drawn[0].axes[0].get_xlabel()
    assert "50 principal components" in drawn[0].axes[0].get_xlabel()


def test_many_classes_have_colours_of_a_row_and_no_names(tmp_path: pathlib.Path, drawn) -> None:
    plots.plot_features(*groups(2, classes=25), [str(i) for i in range(25)], tmp_path / "features.png")
    (axis,) = drawn[0].axes
    assert not list(axis.texts) and axis.get_legend() is None
    assert len({tuple(collection.get_facecolor()[0]) for collection in axis.collections}) == 25


@pytest.mark.parametrize(
    "features",
    [np.ones((6, 5)), np.random.RandomState(0).normal(size=(4, 5)), np.random.RandomState(0).normal(size=(6, 1))],
    ids=["equal", "four images", "one number"],
)
def test_degenerate_features_are_drawn_too(tmp_path: pathlib.Path, features, drawn) -> None:
    plots.plot_features(features, np.arange(len(features)) % 2, ("a", "b"), tmp_path / "features.png")
    assert all(np.isfinite(points).all() for points in points_of(drawn[0].axes[0]))


@pytest.mark.parametrize(
    ("features", "message"),
    [(np.ones((3, 5)), "4 images or more; there are 3"), (np.full((6, 5), np.nan), "some are not finite")],
)
def test_features_that_cannot_be_embedded_are_refused(tmp_path: pathlib.Path, features, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plots.plot_features(features, np.zeros(len(features), int), ("a",), tmp_path / "features.png")
