import dataclasses
import pathlib

import numpy as np
import PIL.Image
import pytest

from bnn_jax.report import codebook_plots
from bnn_jax.report.codebook_plots import CodebookUse, draw_tiles, plot_pattern_motion, plot_pattern_use

pytest.importorskip("matplotlib")


@pytest.fixture
def use() -> CodebookUse:
    initial = np.array([[1] * 9, [-1] * 9, [1, -1, 1] * 3, [-1, 1, -1] * 3])
    codebook = initial * 1.5
    codebook[0, 4] = -0.5
    free_counts = np.zeros(512, int)
    free_counts[[0, 1, 511]] = 5, 3, 2
    return CodebookUse(np.where(codebook > 0, 1, -1), np.array([1, 7, 0, 2]), free_counts, codebook, initial)


@pytest.fixture
def drawn(monkeypatch):
    figures, make = [], codebook_plots.new_figure

    def remember(**size):
        figures.append(make(**size))
        return figures[-1]

    monkeypatch.setattr(codebook_plots, "new_figure", remember)
    return figures


def test_flipped_signs_are_those_that_differ_from_the_start(use):
    assert np.argwhere(use.flipped).tolist() == [[0, 4]]


def test_the_use_is_drawn_from_the_most_used_pattern_on(use, drawn, tmp_path: pathlib.Path):
    plot_pattern_use({"conv1": use, "conv2": use}, tmp_path / "use.png", title="t")
    curve, tiles = drawn[0].axes[:2]
    free, codebook = (line.get_ydata().tolist() for line in curve.get_lines())
    assert free == [50.0, 30.0, 20.0] and codebook == [70.0, 20.0, 10.0]
    assert tiles.get_title(loc="left") == "the 4 most used of 4: 100% of the kernels; 3 in use"
    image = tiles.images[0].get_array()
    # The second pattern (all -1) is used most, so its tile comes first.
    assert (image[:3, :3] == 0).all()
    with PIL.Image.open(tmp_path / "use.png") as picture:
        assert min(picture.size) > 400


def test_the_motion_counts_the_changed_patterns(use, drawn, tmp_path: pathlib.Path):
    unchanged = dataclasses.replace(use, patterns=use.initial)
    plot_pattern_motion({"conv1": use, "conv2": unchanged}, tmp_path / "motion.png", title="t")
    titles = [axis.get_title(loc="left") for axis in drawn[0].axes]
    assert titles == [
        "conv1",
        "1 of 4 patterns changed, 2.8% of the signs; all of them:",
        "conv2",
        "no pattern changed",
    ]
    assert (tmp_path / "motion.png").stat().st_size > 0


def test_a_tile_shows_a_pattern_row_by_row():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    pattern = np.array([[1, 1, -1, -1, -1, -1, -1, -1, 1]])
    assert draw_tiles(axis, pattern, np.zeros((1, 9), bool)) == 1
    assert axis.images[0].get_array()[:3, :3].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("plot", [plot_pattern_use, plot_pattern_motion])
def test_a_network_without_codebooks_is_refused(plot, tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="no layer has a codebook"):
        plot({}, tmp_path / "x.png", title="t")
