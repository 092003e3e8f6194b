"""BASQ through ``launch.py``: all phases, killed in each of them and resumed, one table at the end."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from bnn_jax.experiment import search as search_stage
from tests.conftest import ROOT
from tests.integration.launching import (
    SAVE_ALWAYS,
    TIMES,
    assert_same_run,
    launch_here,
    launch_killed,
    launch_well,
    refused,
    saved_arrays,
    steps,
)

# Six searched layers, two steps per stage, two folds of 20 images, two generations of four paths.
SMOKE = (
    f"--config={ROOT / 'configs' / 'basq_resnet20_cifar.py'}:smoke",
    "--config.network=basq_resnet8_cifar",
    "--config.basq.teacher_network=resnet8",
    "--config.data.image_size=8",
    "--config.data.num_classes=2",
    "--config.data.num_train=56",
    f"--config.data.validation_fraction={40 / 56}",
)
TRAINED = ("00_teacher", "01_supernet_activations", "02_supernet", "04_finetune_0", "05_finetune_1")
SEARCH = "03_search"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder of a run that nothing interrupted, and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("basq") / "run"
    finished = launch_well(*SMOKE, f"--workdir={folder}", "--json")
    assert "Winners" in finished.stdout
    return folder, finished.last_json


def read(path: Path) -> dict:
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in TIMES}


def searched(folder: Path) -> list[dict]:
    """What a search left: its result and that of every fold, with the state of the random numbers."""
    return [read(folder / SEARCH / name) for name in ("result.json", "fold_00.json", "fold_01.json")]


def test_the_winners_of_the_search_are_fine_tuned_and_reported(whole):
    folder, printed = whole
    _, *folds = searched(folder)
    rows = printed["winners"]["rows"]
    assert [row["path"] for row in rows] == [fold["path"] for fold in folds]
    assert all(len(row["path"]) == 6 and set(row["path"]) <= set(range(7)) for row in rows)
    for row, stage in zip(rows, TRAINED[-2:]):
        result = read(folder / stage / "result.json")
        assert (row["tuned_top1"], row["test_top1"]) == (result["tuned_top1"], result["last_top1"])
    mean = printed["winners"]["statistics"]["test_top1"]["mean"]
    assert mean == pytest.approx(np.mean([row["test_top1"] for row in rows]))


def test_every_fold_evaluates_different_paths_and_keeps_its_history(whole):
    folder, _ = whole
    for fold in searched(folder)[1:]:
        paths = [tuple(row["path"]) for row in fold["archive"]]
        assert len(paths) == len(set(paths)) == fold["evaluations"] == 8
        accuracies = [row["fold_top1"] for row in fold["archive"]]
        assert accuracies == sorted(accuracies, reverse=True)
        assert [row["fold_top1"] for row in fold["history"]][-1] == fold["fold_top1"] == accuracies[0]


def test_a_winner_is_stored_without_the_other_branches(whole):
    folder, _ = whole
    supernet, winner = (read(folder / stage / "result.json") for stage in ("02_supernet", "04_finetune_0"))
    assert winner["parameters"] < supernet["parameters"]
    assert winner["quantized_weight_bits"] == supernet["quantized_weight_bits"] == 2 * 73_728


def test_fine_tuning_leaves_the_weights_alone(whole):
    folder, _ = whole
    before, after = (saved_arrays(folder / stage) for stage in ("02_supernet", "04_finetune_0"))
    moved = {
        path.rpartition("/")[2]
        for path, value in before.items()
        if path.startswith(("params/", "batch_stats/")) and not np.array_equal(value, after[path])
    }
    assert moved <= {"bias", "upper_bound", "mean", "var"}
    assert {"mean", "var"} <= moved


def test_evaluate_and_report_know_the_winner(whole):
    folder, printed = whole
    finished = launch_well(*SMOKE, f"--workdir={folder}", "--mode=evaluate", "--stage=finetune_1", "--json")
    assert finished.last_json["top1"] == printed["winners"]["rows"][1]["test_top1"]
    line = refused(launch_here(*SMOKE, f"--workdir={folder}", "--mode=evaluate", "--stage=search"))
    assert "trains nothing" in line


def copy_without(folder: Path, target: Path, stage: str) -> None:
    """The finished run without one stage, which the next launch makes anew; it skips those that are finished."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / stage)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "count"), [("generation", 1), ("evaluated", 5)])
def test_a_search_killed_in_or_after_a_generation_ends_with_the_same_archive(tmp_path, whole, place, count):
    folder, _ = whole
    copied = tmp_path / "run"
    copy_without(folder, copied, SEARCH)
    launch_killed(place, count, *SMOKE, f"--workdir={copied}")
    assert not (copied / SEARCH / "result.json").exists()
    launch_well(*SMOKE, f"--workdir={copied}")
    assert searched(copied) == searched(folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["01_supernet_activations", "02_supernet", "04_finetune_0"])
def test_a_phase_killed_after_its_first_step_goes_on_to_the_same_bits(tmp_path, whole, stage):
    folder, _ = whole
    copied = tmp_path / "run"
    copy_without(folder, copied, stage)
    launch_killed("saved", 1, *SMOKE, SAVE_ALWAYS, f"--workdir={copied}")
    assert steps(copied / stage) == [1]
    assert not (copied / stage / "result.json").exists()
    finished = launch_well(*SMOKE, f"--workdir={copied}")
    assert "going on from step 1" in finished.stderr
    assert_same_run(copied, folder, (stage,))


def test_a_search_asked_to_stop_is_saved(tmp_path, whole, monkeypatch):
    folder, _ = whole
    copied = tmp_path / "run"
    copy_without(folder, copied, SEARCH)
    original, calls = search_stage.Progress.report, []

    def stop_after_the_first(self, *arguments):
        original(self, *arguments)
        calls.append(arguments)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(search_stage.Progress, "report", stop_after_the_first)
    stopped = launch_here(*SMOKE, f"--workdir={copied}")
    assert stopped.code == 128 + signal.SIGTERM
    assert "search stopped in fold 1 after generation 1" in stopped.stderr
    assert (copied / SEARCH / search_stage.STATE).exists()
