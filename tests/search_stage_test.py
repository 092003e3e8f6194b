import io

import pytest

from bnn_jax import search_stage
from bnn_jax.report import tables
from bnn_jax.training.progress import SearchProgress


def result(fold, **changes):
    """A fine-tuned winner's result."""
    row = {"fold": fold, "path": [fold, 1], "folds": 4, "fold_top1": 60.0 - fold, "full_top1": 50.0}
    return {**row, "tuned_top1": 55.0 + fold, "last_top1": 54.0, **changes}


def text_of(table):
    file = io.StringIO()
    tables.show(table, file=file)
    return " ".join(file.getvalue().split())


def test_winners_are_rows_with_mean_and_deviation_and_a_common_column():
    winners = search_stage.winners([{"stage": "supernet", "last_top1": 1.0}, *map(result, range(3))])
    assert [row["fold"] for row in winners["rows"]] == [0, 1, 2]
    assert winners["statistics"]["tuned_top1"] == {"mean": 56.0, "deviation": 1.0, "lowest": 55.0, "highest": 57.0}
    assert winners["correlation"] == pytest.approx(-1)
    # A quarter of the images is in the fold.
    assert winners["rows"][0]["combined_top1"] == pytest.approx(60 / 4 + 50 * 3 / 4)
    text = text_of(tables.winners_table(winners))
    assert "winner path fold full bnfull test" in text
    assert "1 1 1 59.00 50.00 56.00 54.00" in text
    assert "mean 59.00 50.00 56.00 54.00 sd 1.00 0.00 1.00 0.00" in text
    assert "Correlation of fold and bnfull: -1.000" in text


def test_a_single_winner_has_no_correlation():
    winners = search_stage.winners([result(0)])
    assert winners["correlation"] is None
    assert "Correlation" not in text_of(tables.winners_table(winners))


def test_without_a_fine_tuned_winner_there_is_no_table():
    assert search_stage.winners([{"stage": "search", "folds": []}]) is None


def test_the_progress_of_a_search_names_fold_generation_best_and_time_left(capsys):
    with SearchProgress("search", folds=3, total=63, done=0) as progress:
        progress.generation_done(1, 4, {"path": (3, 0, 6), "fold_top1": 61.234, "full_top1": 58.0})
    line = capsys.readouterr().err.strip()
    assert line.startswith(
        "search: fold 2/3  generation 4  best 61.23 % (outside of the fold 58.00 %)  path 3 0 6  0:00:0"
    )
    assert line.endswith(" left")
