"""Pictures are written for complete and for sparse results, and say what is missing without matplotlib."""

import pathlib
import sys

import numpy as np
import PIL.Image
import pytest

from bnn_jax.errors import UserError
from bnn_jax.report import plots
from bnn_jax.report.levels import LevelCounts

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
    figures, make = [], plots._new_figure

    def remember(**size):
        figures.append(make(**size))
        return figures[-1]

    monkeypatch.setattr(plots, "_new_figure", remember)
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


def test_stages_of_equal_bits_are_told_apart_by_name(tmp_path: pathlib.Path, drawn) -> None:
    plots.plot_chain([{**RESULTS[0], "bits": 1}, RESULTS[1]], METRICS, tmp_path / "chain.png")
    assert [label.get_text() for label in drawn[0].axes[1].get_xticklabels()] == ["w32a32", "w1a1"]


def test_sparse_results_are_drawn_too(tmp_path: pathlib.Path) -> None:
    plots.plot_chain([{"stage": "only"}], {}, tmp_path / "chain.png")
    assert (tmp_path / "chain.png").stat().st_size > 0


def test_shares_of_the_levels(tmp_path: pathlib.Path, drawn) -> None:
    counts = {"conv": LevelCounts(levels=np.array([-1.0, 0.0, 1.0]), counts=np.array([3, 0, 1]), masked=0)}
    plots.plot_weights(counts, tmp_path / "weights.png")
    (axis,) = drawn[0].axes
    assert [bar.get_height() for bar in axis.patches] == [75, 0, 25]
    assert axis.get_title() == "conv: 2 of 3 levels"


def test_without_matplotlib_the_error_names_the_extra(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'bnn_jax\[report\]'"):
        plots.plot_chain(RESULTS, METRICS, tmp_path / "chain.png")
