"""Self-distillation through ``launch.py``: killed and resumed, reported with its pictures, added to another method."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.conftest import ROOT
from tests.integration.launching import (
    SAVE_ALWAYS,
    assert_same_run,
    launch_here,
    launch_killed,
    launch_well,
    records,
    refused,
    saved_arrays,
    steps,
)

# Two epochs of two steps; dropout, clamped biases and a bank of log-probabilities besides the four terms.
MLP = (f"--config={ROOT / 'configs' / 'skd_mnist_mlp.py'}:smoke", "--config.data.image_size=8")
STAGE = "00_train"
TERMS = {"squared_hinge", "feature_swap", "label_bank", "cluster"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("skd") / "run"
    launch_well(*MLP, f"--workdir={folder}")
    return folder


def test_the_record_holds_every_term(whole):
    first, second = records(whole / STAGE)
    assert {name.removeprefix("loss/") for name in first if name.startswith("loss/")} == TERMS
    assert first["loss/label_bank"] == 0 < second["loss/label_bank"]


@pytest.mark.slow
def test_a_run_killed_while_the_bank_teaches_goes_on_to_the_same_bits(tmp_path, whole):
    # The third checkpoint is that of step 3, in the middle of the second epoch.
    launch_killed("saved", 3, *MLP, SAVE_ALWAYS, f"--workdir={tmp_path}")
    assert steps(tmp_path / STAGE)[-1] == 3
    saved = saved_arrays(tmp_path / STAGE)
    assert np.abs(saved["objective_state/label_bank/bank"]).max() > 0
    assert saved["objective_state/label_bank/known"].any()
    assert saved["objective_state/label_bank/epochs"] == 1
    finished = launch_well(*MLP, f"--workdir={tmp_path}")
    assert "stage train: going on from step 3" in finished.stderr
    assert_same_run(tmp_path, whole, (STAGE,))


def test_gradient_norms_are_recorded_on_demand(tmp_path, whole):
    launch_well(*MLP, "--config.skd.log_gradient_norms=True", f"--workdir={tmp_path}")
    second, plain = records(tmp_path / STAGE)[1], records(whole / STAGE)[1]
    norms = {name: value for name, value in second.items() if name.startswith("gradient_norm/")}
    assert {name.removeprefix("gradient_norm/") for name in norms} == TERMS
    assert all(value > 0 for value in norms.values())
    # One pullback for each term instead of one for their sum: rounding of four steps.
    assert second["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


def test_report_draws_the_label_bank_and_the_features(whole):
    pytest.importorskip("matplotlib")
    finished = launch_well(*MLP, f"--workdir={whole}", "--mode=report", "--json")
    names = [f"{name}.png" for name in ("chain", "accuracies", "label_bank", "features", "confusion", "mistakes")]
    assert finished.last_json["pictures"] == [str(whole / name) for name in names]
    assert finished.last_json["picture"] == str(whole / "chain.png")
    for name in names:
        assert f"picture: {whole / name}" in finished.stdout
        with PIL.Image.open(whole / name) as image:
            assert min(image.size) > 500


def test_report_goes_on_without_a_picture_that_cannot_be_drawn(tmp_path, whole):
    pytest.importorskip("matplotlib")
    three_images = (*MLP, "--config.data.num_eval=3", f"--workdir={tmp_path}")
    launch_well(*three_images)
    finished = launch_well(*three_images, "--mode=report", "--json")
    names = [Path(path).name for path in finished.last_json["pictures"]]
    assert names == ["chain.png", "accuracies.png", "label_bank.png", "confusion.png", "mistakes.png"]
    assert "no features.png of stage train: " in finished.stderr and "there are 3" in finished.stderr
    assert not (tmp_path / "features.png").exists()


@pytest.mark.slow
def test_the_terms_can_be_added_to_the_last_rung_of_another_method(tmp_path):
    launch_well(
        f"--config={ROOT / 'configs' / 'asbq_skd_resnet20.py'}:smoke",
        "--config.network=resnet8",
        "--config.data.image_size=16",
        "--config.asbq.bits=(32,1)",
        "--config.asbq.learning_rates=(0.1,0.01)",
        "--config.asbq.epochs=(2,)",
        f"--workdir={tmp_path}",
    )
    first, last = (records(tmp_path / name)[-1] for name in ("00_w32a32", "01_w1a1"))
    added = {"loss/feature_swap", "loss/label_bank", "loss/cluster"}
    assert not added & set(first)
    assert all(last[name] > 0 for name in added)
    assert json.loads((tmp_path / "01_w1a1" / "result.json").read_text())["bits"] == 1


def test_a_term_that_is_there_already_is_refused(tmp_path):
    line = refused(launch_here(*MLP, "--config.extra_objectives=('cluster',)", f"--workdir={tmp_path}"))
    assert line == "error: config.extra_objectives: 'cluster' is part of stage train already"
