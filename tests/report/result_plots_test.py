"""Plots of the results show ours over what was published, and leave out what is not there."""

import copy

from bnn_jax.report import result_plots, results
from tests.report.results_test import RESULT, STAGE, changed, written


def rows_of(folder, **contents):
    return results.read_rows(written(folder, **contents))


def test_the_published_curve_lies_behind_ours(tmp_path):
    [axis] = result_plots.plot_curves(rows_of(tmp_path, run=RESULT)).axes
    published, ours = axis.get_lines()
    assert published.get_ydata().tolist() == [50, 70, 90]
    assert ours.get_ydata().tolist() == [61, 60]
    assert not axis.collections


def test_several_seeds_have_a_band(tmp_path):
    rows = rows_of(tmp_path, one=changed(1), two=changed(2, metrics=[{"test_top1": 63.0}, {"test_top1": 64.0}]))
    [axis] = result_plots.plot_curves(rows).axes
    assert axis.get_lines()[1].get_ydata().tolist() == [62, 62]
    assert len(axis.collections) == 1


def test_accuracy_is_drawn_against_both_costs(tmp_path):
    rows = rows_of(tmp_path, run=changed(stored_bits=1000, bit_operations=20))
    bits, operations = result_plots.plot_accuracy(rows).axes
    assert bits.collections[0].get_offsets().tolist() == [[1000, 60]]
    assert operations.collections[0].get_offsets().tolist() == [[20, 60]]


def test_the_rungs_of_a_chain_are_one_line(tmp_path):
    content = copy.deepcopy(RESULT)
    content["stages"] = [{**STAGE, "stage": f"w{bits}", "bits": bits, "last_top1": 60 + bits} for bits in (4, 2, 1)]
    content.update(shown=["w4", "w2", "w1"], published={})
    [axis] = result_plots.plot_chains(rows_of(tmp_path, run=content)).axes
    [line] = axis.get_lines()
    assert line.get_ydata().tolist() == [64, 62, 61]
    assert line.get_label() == "a run"


def test_nothing_is_drawn_without_something_to_draw(tmp_path):
    rows = rows_of(tmp_path, run={**RESULT, "published": {}})
    assert result_plots.plot_curves(rows) is result_plots.plot_accuracy(rows) is result_plots.plot_chains(rows) is None


def test_the_pictures_lie_in_the_documents(tmp_path):
    (tmp_path / "results").mkdir()
    written(tmp_path / "results", run=RESULT)
    assert result_plots.draw(tmp_path) == [tmp_path / "docs" / "figures" / "curves.png"]
    assert (tmp_path / "docs" / "figures" / "curves.png").stat().st_size > 1000
