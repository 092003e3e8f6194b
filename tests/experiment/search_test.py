import dataclasses
import io
import json

import numpy as np
import pytest

from bnn_jax.errors import Interrupted, UserError
from bnn_jax.experiment import search
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.results import winners
from bnn_jax.report import tables
from bnn_jax.search.evolution import Evolution, Settings
from bnn_jax.search.folds import make_folds
from bnn_jax.stages import DataSpec, OptimSpec, QuantSpec, Stage, spec
from bnn_jax.training.interrupt import StopRequest
from bnn_jax.training.progress import Progress

OPTIM = OptimSpec(spec("sgd"), spec("constant", value=0.1), epochs=1, batch_size=8)
STAGE = Stage("search", spec("x"), QuantSpec(), DataSpec("digits"), (), OPTIM)


TRAINED = {
    **{"stage": "tuned", "stage_fingerprint": "0", "bits": 2, "seconds": 1.0, "images_per_second": 1.0, "epochs": 1},
    **{"best_top1": 1.0, "best_epoch": 0, "selection": "test", "quantized_weight_bits": 0, "stored_bits": 0},
}


def result(fold, **changes):
    """A fine-tuned winner's result."""
    row = {"fold": fold, "path": [fold, 1], "folds": 4, "fold_top1": 60.0 - fold, "full_top1": 50.0}
    return {**TRAINED, **row, "tuned_top1": 55.0 + fold, "last_top1": 54.0, **changes}


def folder_of(path, *results):
    """A run folder in which the stages of these results are finished; one more is not."""
    choices = ["search:x#0" if "tuned_top1" in content else None for content in results]
    stages = tuple(
        dataclasses.replace(STAGE, name=f"stage_{index}", choice=choice)
        for index, choice in enumerate([*choices, "search:x#0"])
    )
    folder = RunFolder(path, stages)
    for name, content in zip(folder.names, results):
        folder.stage(name).mkdir()
        (folder.stage(name) / "result.json").write_text(json.dumps(content))
    return folder


def text_of(table):
    file = io.StringIO()
    tables.show(table, file=file)
    return " ".join(file.getvalue().split())


def test_winners_are_rows_with_mean_and_deviation_and_a_common_column(tmp_path):
    found = winners(folder_of(tmp_path, {**TRAINED, "last_top1": 1.0}, *map(result, range(3))))
    assert [row["fold"] for row in found["rows"]] == [0, 1, 2]
    assert found["statistics"]["tuned_top1"] == {"mean": 56.0, "deviation": 1.0, "lowest": 55.0, "highest": 57.0}
    assert found["correlation"] == pytest.approx(-1)
    # A quarter of the images is in the fold.
    assert found["rows"][0]["combined_top1"] == pytest.approx(60 / 4 + 50 * 3 / 4)
    text = text_of(tables.winners_table(found))
    assert "winner path fold full bnfull test" in text
    assert "1 1 1 59.00 50.00 56.00 54.00" in text
    assert "mean 59.00 50.00 56.00 54.00 sd 1.00 0.00 1.00 0.00" in text
    assert "Correlation of fold and bnfull: -1.000" in text


def test_a_single_winner_has_no_correlation(tmp_path):
    found = winners(folder_of(tmp_path, result(0)))
    assert found["correlation"] is None
    assert "Correlation" not in text_of(tables.winners_table(found))


def test_without_a_fine_tuned_winner_there_is_no_table(tmp_path):
    assert winners(folder_of(tmp_path, {"stage": "search", "folds": []})) is None


# ---- searching fold after fold, with made-up accuracies

FOLDS = make_folds(np.arange(60) % 5, kind="stratified", count=3, batch_size=1)
SETTINGS = Settings(genes=5, choices=4, population=8, mutations=3, crossovers=3, parents=3, generations=4)


def search_stage_of(*, one_random_stream: bool) -> Stage:
    return dataclasses.replace(STAGE, search=spec("evolution", one_random_stream=one_random_stream, seed=7))


def accuracies(paths, images):
    """A number for each path that depends on the images too, with ties."""
    return [float(np.sum(np.square(np.array(path) - images[:5] % 4)) % 37) for path in paths]


def run_folds(folder, stage, *, stop_at: int | None = None):
    """Searches what is left; the evaluation number ``stop_at``, from 0, is interrupted."""
    calls = []

    def evaluate(paths, images):
        calls.append(len(paths))
        return None if len(calls) - 1 == stop_at else accuracies(paths, images)

    before = None
    with Progress("search", total=15) as progress, StopRequest() as stop:
        for fold in range(3):
            path = folder / f"fold_{fold:02d}.json"
            if not path.exists():
                under_way = search._start(stage, SETTINGS, folder / search.STATE, fold, before)
                search._search_fold(under_way, FOLDS, evaluate, path, progress, stop)
            before = json.loads(path.read_text())
    return [json.loads(path.read_text()) for path in sorted(folder.glob("fold_*.json"))]


@pytest.mark.parametrize("one_random_stream", [True, False])
def test_a_search_stopped_at_any_evaluation_ends_with_the_same_archives(tmp_path, one_random_stream):
    stage = search_stage_of(one_random_stream=one_random_stream)
    whole = run_folds(_made(tmp_path / "whole"), stage)
    for stop_at in range(0, 20, 3):
        folder = _made(tmp_path / str(stop_at))
        with pytest.raises(Interrupted, match="the same command goes on"):
            run_folds(folder, stage, stop_at=stop_at)
        assert run_folds(folder, stage) == whole


def test_every_generation_is_a_line_with_fold_best_and_time_left(tmp_path, capsys):
    results = run_folds(_made(tmp_path / "a"), search_stage_of(one_random_stream=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 15
    best = results[1]["history"][2]
    assert lines[7].startswith(
        f"search: fold 2/3  generation 3  best {best['fold_top1']:.2f} % (outside of the fold "
        f"{best['full_top1']:.2f} %)  path {' '.join(map(str, best['path']))}  0:00:0"
    )
    assert lines[-1].endswith("  0:00:00 left")


def _made(folder):
    folder.mkdir()
    return folder


def test_folds_continue_one_random_stream_or_have_one_each(tmp_path):
    first = {}
    for one_random_stream in (True, False):
        stage = search_stage_of(one_random_stream=one_random_stream)
        results = run_folds(_made(tmp_path / str(one_random_stream)), stage)
        first[one_random_stream] = [{tuple(row["path"]) for row in result["archive"]} for result in results]
    assert first[True][0] == first[False][0]
    assert first[True][1] != first[False][1]


def test_the_history_of_a_fold_holds_the_best_path_of_every_generation(tmp_path):
    for result in run_folds(_made(tmp_path / "a"), search_stage_of(one_random_stream=True)):
        inside = [row["fold_top1"] for row in result["history"]]
        assert inside == sorted(inside) and len(inside) == 5
        assert result["evaluations"] == 40
        best = result["history"][-1]
        images = FOLDS.others(result["fold"])
        assert (best["path"], best["fold_top1"]) == (result["path"], result["fold_top1"])
        assert result["full_top1"] == accuracies([result["path"]], images)[0]


# ---- a search under way whose file is damaged


def state_file(folder, **changes):
    """``state.json`` after one generation, with some fields of its evolution replaced."""
    evolution = Evolution(SETTINGS, np.random.RandomState(0))
    evolution.tell([float(index) for index in range(len(evolution.ask()))])
    row = {"path": list(evolution.best), "fold_top1": 100.0, "full_top1": 50.0}
    content = {"fold": 1, "evolution": {**evolution.state(), **changes}, "history": [row]}
    path = folder / search.STATE
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generation": 3}, "history has 1 rows: accepted are evolution.generation=3"),
        ({"evaluated": []}, "evolution.evaluated=[]: accepted is one or more"),
        ({"evaluated": [[[0], 1]]}, "evolution.evaluated[0][0]=[0]: accepted is a list of 5"),
        ({"evaluated": [[[0, 1, 2, 3, 4], 1]]}, "evolution.evaluated[0][0][4]=4: accepted is a whole number from 0 to"),
        ({"seen": [1]}, "evolution.seen[0]=1: accepted is a list of 5"),
        ({"rng": ["PCG64"]}, "evolution.rng=['PCG64']: accepted is a list of 5"),
    ],
)
def test_a_damaged_search_under_way_is_named(tmp_path, changes, words):
    stage = search_stage_of(one_random_stream=False)
    assert search._start(stage, SETTINGS, state_file(tmp_path), 1, None).evolution.generation == 1
    path = state_file(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        search._start(stage, SETTINGS, path, 1, None)
    assert f"{path} is damaged: {words}" in str(error.value)
