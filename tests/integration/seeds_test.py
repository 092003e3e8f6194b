"""Two seeds trained at once, through ``launch.py``."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.integration.launching import (
    SAVE_ALWAYS,
    STAGES,
    TWO_RUNGS,
    assert_same_run,
    launch_here,
    launch_killed,
    records,
    result,
    saved_arrays,
    steps,
)

TWO_SEEDS = (*TWO_RUNGS, "--config.num_seeds=2")
# Seed i of a run of two seeds from 0, as it is alone.
ALONE = ("--config.seed=0", "--config.seed=1")


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """The folder of a run of the seeds 0 and 1 that nothing interrupted."""
    folder = tmp_path_factory.mktemp("together") / "run"
    finished = launch_here(*TWO_SEEDS, f"--workdir={folder}")
    assert finished.code == 0, finished.stderr
    assert finished.stderr.count("config.num_seeds=2: this is for accelerators") == 1
    assert "±" in finished.stdout
    return folder


def test_each_of_two_seeds_is_the_run_it_is_alone(tmp_path, together, two_rungs):
    alone = [two_rungs, tmp_path]
    assert launch_here(*TWO_RUNGS, ALONE[1], f"--workdir={tmp_path}").code == 0
    for stage in STAGES:
        both = saved_arrays(together / stage)
        for seed, folder in enumerate(alone):
            expected = saved_arrays(folder / stage)
            assert both.keys() == expected.keys()
            for path, value in expected.items():
                # Four steps of sums in another order, of values of about 1; where a mean is 0 nothing but rounding is
                # left of it. Masks, keys and counts are integers and equal.
                np.testing.assert_allclose(both[path][seed], value, rtol=1e-4, atol=2e-6, err_msg=f"{stage} {path}")
            for record, own in zip(records(together / stage), records(folder / stage), strict=True):
                values = record["seeds"][seed]
                assert values.pop("seed") == seed
                assert values == pytest.approx({key: own[key] for key in values}, rel=1e-5, abs=2e-6)
            row, own = result(together / stage)["seeds"][seed], result(folder / stage)
            assert row == pytest.approx({"seed": seed, **{key: own[key] for key in row if key != "seed"}}, rel=1e-5)


def test_the_result_of_two_seeds_has_means_and_deviations(together):
    for stage in STAGES:
        content, last = result(together / stage), records(together / stage)[-1]
        assert content["num_seeds"] == 2 and content["seed"] == 0
        for name, key in {"last_top1": "test_top1", "last_top5": "test_top5", "last_loss": "test_loss"}.items():
            values = [row[key] for row in last["seeds"]]
            assert content[name] == pytest.approx(np.mean(values))
            assert content[f"{name}_sd"] == pytest.approx(np.std(values, ddof=1))
        assert content["best_top1"] == max(record["test_top1"] for record in records(together / stage))
    assert [row["seed"] for row in result(together / STAGES[0])["seeds"]] == [0, 1]


def test_each_seed_has_a_file_of_its_weights_and_columns_in_the_table(together):
    weights = [np.load(together / STAGES[1] / f"weights_seed_{seed}.npz") for seed in (0, 1)]
    assert weights[0].files == weights[1].files
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0].files)
    assert not (together / STAGES[1] / "weights.npz").exists()
    header = (together / STAGES[1] / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"test_top1", "test_top1_sd", "seed_0/test_top1", "seed_1/test_top1"} <= set(header)
    assert "seeds" not in header


@pytest.mark.slow
def test_a_killed_run_of_two_seeds_ends_as_if_nothing_had_happened(together, copy_of):
    folder = copy_of(together)
    # The second stage has a teacher for each seed; it is killed in the middle of its first epoch.
    shutil.rmtree(folder / STAGES[1])
    command = (*TWO_SEEDS, SAVE_ALWAYS, f"--workdir={folder}")
    launch_killed("saved", 1, *command)
    assert steps(folder / STAGES[1]) == [1]
    finished = launch_here(*TWO_SEEDS, f"--workdir={folder}")
    assert finished.code == 0 and "stage w1a1: going on from step 1" in finished.stderr
    assert_same_run(folder, together)


def test_evaluation_and_report_work_for_two_seeds(together, copy_of):
    folder = copy_of(together)
    evaluated = launch_here(*TWO_SEEDS, f"--workdir={folder}", "--mode=evaluate", "--json")
    assert evaluated.code == 0, evaluated.stderr
    found, content = evaluated.last_json, result(folder / STAGES[1])
    for name in ("top1", "top1_sd", "loss", "loss_sd"):
        assert found[name] == pytest.approx(content[f"last_{name}"], rel=1e-5)
    assert [row["top1"] for row in found["seeds"]] == [row["last_top1"] for row in content["seeds"]]
    assert "w1a1, seed 1: top-1 " in evaluated.stdout and "w1a1, mean of 2 seeds: top-1 " in evaluated.stdout

    by_path = launch_here(*TWO_SEEDS, "--mode=evaluate", f"--checkpoint={folder / STAGES[1]}", "--json")
    assert {**by_path.last_json, "checkpoint": ""} == {**found, "checkpoint": ""}

    reported = launch_here(*TWO_SEEDS, f"--workdir={folder}", "--mode=report")
    assert reported.code == 0, reported.stderr
    assert "other pictures the first seed, 0" in reported.stderr
    assert (folder / "chain.png").exists() and "±" in reported.stdout


def test_pictures_of_two_seeds_are_those_of_the_first(tmp_path):
    config = f"--config={ROOT / 'configs' / 'skd_mnist_mlp.py'}:smoke"
    command = (config, "--config.skd.hidden=16", "--config.num_seeds=2", f"--workdir={tmp_path}")
    trained = launch_here(*command)
    assert trained.code == 0, trained.stderr
    reported = launch_here(*command, "--mode=report", "--json")
    assert reported.code == 0, reported.stderr
    assert {"label_bank.png", "features.png"} <= {Path(path).name for path in reported.last_json["pictures"]}


def test_a_folder_of_two_seeds_is_not_taken_for_one_of_three(together):
    finished = launch_here(*TWO_RUNGS, "--config.num_seeds=3", f"--workdir={together}")
    assert "holds a run of another config: config.num_seeds: 2 -> 3;" in finished.error_line


def test_a_checkpoint_of_one_seed_is_refused_for_two(two_rungs, tmp_path):
    folder = two_rungs / STAGES[1]
    finished = launch_here(*TWO_SEEDS, f"--workdir={tmp_path}", "--mode=evaluate", f"--checkpoint={folder}")
    assert "checkpoint of another network" in finished.error_line


@pytest.mark.parametrize(
    ("config", "flag", "message"),
    [
        ("quickstart.py:smoke", "--config.num_seeds=0", "config.num_seeds=0: accepted is int, 1 to 64"),
        ("quickstart.py:smoke", "--config.num_seeds=65", "config.num_seeds=65: accepted is int, 1 to 64"),
        (
            "quickstart.py:smoke",
            "--config.data.validation_fraction=0.5",
            "config.num_seeds=2: each seed would hold out other images; accepted is config.data.validation_fraction=0",
        ),
        (
            "basq_resnet20_cifar.py:smoke",
            "--config.seed=0",
            "config.num_seeds=2: stage search is a search; accepted with one is 1",
        ),
        (
            "asbq_resnet18.py",
            "--config.seed=0",
            "config.num_seeds=2: the images of imagenet2012 are read while training; accepted with them is 1",
        ),
    ],
)
def test_what_cannot_be_trained_side_by_side_is_refused_before_anything_is_written(tmp_path, config, flag, message):
    folder = tmp_path / "run"
    arguments = (f"--config={ROOT / 'configs' / config}", "--config.num_seeds=2", flag, f"--workdir={folder}")
    finished = launch_here(*arguments)
    assert finished.error_line == f"error: {message}"
    assert not folder.exists()


def test_several_devices_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 8)
    finished = launch_here(*TWO_SEEDS, f"--workdir={tmp_path / 'run'}")
    assert finished.error_line.startswith("error: config.num_seeds=2: accepted on 8 devices is 1; ")


def test_a_method_whose_stages_depend_on_the_seed_is_refused(tmp_path, monkeypatch):
    from bnn_jax import methods

    build = methods.build

    def longer_for_odd_seeds(config):
        epochs = (1 + config["seed"] % 2,)
        return build({**config, "asbq": {**config["asbq"], "epochs": epochs}})

    monkeypatch.setattr(methods, "build", longer_for_odd_seeds)
    finished = launch_here(*TWO_SEEDS, f"--workdir={tmp_path / 'run'}")
    assert finished.error_line == (
        "error: config.num_seeds=2: stage w32a32 of another seed is another stage; accepted is 1"
    )
