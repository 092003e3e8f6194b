"""The quickstart in miniature, through ``launch.py``."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bnn_jax.errors import UserError
from bnn_jax.experiment import training
from bnn_jax.ops import convolution
from tests.integration.launching import (
    QUICKSTART,
    STAGES,
    TWO_RUNGS,
    Finished,
    assert_same_run,
    launch_here,
    launch_well,
    records,
    refused,
    result,
    rungs,
    saved_arrays,
    steps,
)

CHAIN = ["00_w32a32", "01_w8a8", "02_w4a4", "03_w2a2", "04_w1a1"]
RESULT_KEYS = {
    *(
        "stage",
        "bits",
        "last_top1",
        "best_top1",
        "best_epoch",
        "selection",
        "last_loss",
        "last_top5",
        "epochs",
        "steps",
    ),
    *("seed", "num_train", "num_test", "seconds", "images_per_second", "quantized_weight_bits", "level_bits"),
    *("parameters", "data_fingerprint", "stage_fingerprint", "versions", "device", "git_commit"),
}


def here(chain, *arguments: str) -> Finished:
    return launch_here(QUICKSTART, f"--workdir={chain[0]}", *arguments)


# ---- training


def test_the_chain_trains_all_its_rungs(chain):
    folder, finished = chain
    assert finished.code == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == CHAIN
    for name, bits in zip(CHAIN, (32, 8, 4, 2, 1), strict=True):
        assert result(folder / name)["bits"] == bits
        assert steps(folder / name) == [2]
        assert [record["step"] for record in records(folder / name)] == [2]


def test_results_go_to_stdout_and_the_log_to_stderr(chain):
    _, finished = chain
    for name in CHAIN:
        stage = name[3:]
        assert re.search(rf"^ *{stage} ", finished.stdout, re.MULTILINE)
        assert f"{stage}: epoch 1/1  train loss " in finished.stderr
    assert "epoch 1/1" not in finished.stdout


@pytest.mark.parametrize("name", CHAIN)
def test_a_result_has_every_promised_key(chain, name):
    content = json.loads((chain[0] / name / "result.json").read_text())
    assert set(content) >= RESULT_KEYS
    assert content["stage"] == name[3:]
    assert (content["epochs"], content["steps"], content["num_train"], content["num_test"]) == (1, 2, 16, 8)
    assert content["selection"] == "test" and content["best_epoch"] == 0
    assert content["last_top1"] == content["best_top1"] == records(chain[0] / name)[0]["test_top1"]
    assert content["parameters"] == 78_042
    assert len(content["data_fingerprint"]) == len(content["stage_fingerprint"]) == 64
    assert content["versions"]["jax"] and content["device"]
    assert content["cpu_kernels"] == convolution.choice("auto")
    assert content["images_per_second"] > 0 and content["seconds"] > 0


def test_the_bits_of_a_rung_are_those_of_its_quantized_weights(chain):
    # ResNet-8 has 73,728 weights in its six quantized convolutions.
    sizes = [result(chain[0] / name)["quantized_weight_bits"] for name in CHAIN]
    assert sizes == [0, 8 * 73_728, 4 * 73_728, 2 * 73_728, 73_728]
    levels = [result(chain[0] / name)["level_bits"] for name in CHAIN]
    assert levels[0] is None
    # After-quantization masks add the level 0 to those of the quantizer.
    assert levels[1] <= 9 and levels[2:] == [5, 3, 2]


def test_the_config_is_kept_with_the_run(chain):
    content = json.loads((chain[0] / "config.json").read_text())
    assert content["config"]["asbq"]["bits"] == [32, 8, 4, 2, 1]
    assert [stage["name"] for stage in content["stages"]] == [name[3:] for name in CHAIN]


def test_a_rung_starts_from_the_one_before(chain):
    # Two steps at a small rate change little: the rungs stay close to each other, other seeds would not.
    first, second = (saved_arrays(chain[0] / name) for name in CHAIN[:2])
    for path in first:
        if path.startswith("params/") and path.endswith("kernel"):
            assert abs(first[path] - second[path]).max() < 0.25 * abs(first[path]).max(), path


def test_finished_stages_are_skipped(chain):
    folder, first = chain
    before = {path: path.read_bytes() for path in folder.rglob("*.json*") if "checkpoints" not in path.parts}
    again = here(chain)
    assert again.code == 0
    assert again.stderr.count("finished before, last top-1") == 5
    assert "epoch 1/1" not in again.stderr
    assert [line.split() for line in again.stdout.splitlines()] == [line.split() for line in first.stdout.splitlines()]
    assert {path: path.read_bytes() for path in before} == before


def test_keys_that_say_where_or_how_may_change(chain):
    changes = {"data.data_dir": "/elsewhere", "train.eval_batch_size": 3, "train.steps_per_dispatch": 2}
    assert here(chain, *(f"--config.{key}={value}" for key, value in changes.items())).code == 0


def test_another_config_is_refused_with_the_differing_keys(chain):
    line = refused(here(chain, "--config.train.momentum=0.5", "--config.asbq.preset=release"))
    assert 'holds a run of another config: config.asbq.preset: "paper" -> "release"' in line
    assert "config.train.momentum: 0.9 -> 0.5" in line


# ---- evaluate, summary, report


def test_evaluate_gives_the_last_finished_stage(chain):
    finished = here(chain, "--mode=evaluate", "--json")
    assert finished.code == 0
    content = finished.last_json
    assert set(content) == {"top1", "top5", "loss", "num_images", "stage", "checkpoint"}
    last = result(chain[0] / "04_w1a1")
    assert content["stage"] == "w1a1" and content["num_images"] == 8
    assert content["top1"] == last["last_top1"] and content["top5"] == last["last_top5"]
    assert content["loss"] == pytest.approx(last["last_loss"], rel=1e-6)
    assert str(chain[0]) in content["checkpoint"]


def test_evaluate_without_json_prints_a_line_for_people(chain):
    finished = here(chain, "--mode=evaluate", "--stage=w4a4@best")
    assert finished.code == 0
    assert re.fullmatch(r"w4a4@best: top-1 .* %  top-5 .* %  loss .*  \(8 images, .*checkpoints\)\n", finished.stdout)


@pytest.mark.parametrize("inside", ["01_w8a8", "01_w8a8/checkpoints", "01_w8a8/checkpoints/2"])
def test_evaluate_takes_a_checkpoint_and_never_looks_at_the_run_folder(chain, tmp_path, inside):
    arguments = (f"--checkpoint={chain[0] / inside}", "--stage=w8a8", f"--workdir={tmp_path / 'unused'}")
    finished = launch_well(QUICKSTART, "--mode=evaluate", "--json", *arguments)
    assert finished.last_json["top1"] == result(chain[0] / "01_w8a8")["last_top1"]
    assert finished.last_json["loss"] == pytest.approx(result(chain[0] / "01_w8a8")["last_loss"], rel=1e-6)
    assert not (tmp_path / "unused").exists()


def test_summary_names_every_layer_and_the_total(chain, tmp_path):
    finished = launch_well(QUICKSTART, "--mode=summary", "--stage=w2a2", "--json", f"--workdir={tmp_path / 'unused'}")
    content = finished.last_json
    paths = [layer["path"] for layer in content["layers"]]
    assert {"conv1", "layer1_0/conv1", "layer3_0/downsample_conv", "fc"} <= set(paths)
    assert content["total"]["parameters"] == 78_042
    assert content["total"]["quantized_bits"] == 2 * 73_728
    assert content["stage"] == "w2a2"
    assert "Stage w2a2: resnet8, images of 16x16x3" in finished.stdout
    assert not (tmp_path / "unused").exists()


def test_summary_is_of_the_last_stage_and_names_the_others(tmp_path):
    finished = launch_here(QUICKSTART, "--mode=summary", "--json", f"--workdir={tmp_path / 'unused'}")
    assert finished.last_json["stage"] == "w1a1"
    others = "(other stages: --stage=w32a32, --stage=w8a8, --stage=w4a4, --stage=w2a2)"
    assert others in " ".join(finished.stdout.split())


def test_report_has_the_table_and_a_picture(chain):
    pytest.importorskip("matplotlib")
    finished = here(chain, "--mode=report", "--json")
    assert finished.code == 0, finished.stderr
    content = finished.last_json
    assert [row["stage"] for row in content["stages"]] == [name[3:] for name in CHAIN]
    assert (chain[0] / "chain.png").read_bytes().startswith(b"\x89PNG")
    assert content["picture"] == str(chain[0] / "chain.png")
    # The classes together are what the evaluation after the last epoch counted.
    rows = [row for row in content["classes"] if row["images"]]
    right = sum(row["images"] * row["top1"] for row in rows) / sum(row["images"] for row in rows)
    assert right == pytest.approx(content["stages"][-1]["last_top1"])
    assert content["classified_by"] == "w1a1" and "Classes of stage w1a1" in finished.stdout
    assert all(Path(path).is_file() for path in content["numbers"])


# ---- training again


def test_a_stage_that_is_trained_again_moves_its_old_results_aside(two_rungs, copy_of):
    folder = copy_of(two_rungs)
    finished = launch_well(*TWO_RUNGS, f"--workdir={folder}", "--stage=w1a1")
    assert "stage w32a32: finished before" in finished.stderr
    assert f"moved {folder / '01_w1a1'} to {folder / '01_w1a1.old-1'}" in finished.stderr
    assert result(folder / "01_w1a1.old-1") == result(two_rungs / "01_w1a1")
    assert_same_run(folder, two_rungs)


@pytest.fixture
def no_training(monkeypatch) -> str:
    """Every stage fails at once; the error line this gives."""

    def fails(*_: Any, **__: Any) -> None:
        raise UserError("as far as this test goes")

    monkeypatch.setattr(training, "_run_stage", fails)
    return "error: as far as this test goes"


def test_fresh_moves_the_whole_run_aside(two_rungs, copy_of, no_training):
    folder = copy_of(two_rungs)
    finished = launch_here(*TWO_RUNGS, "--config.seed=5", f"--workdir={folder}", "--fresh")
    assert finished.error_line == no_training
    assert_same_run(folder.with_name("copy.old-1"), two_rungs)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert json.loads((folder / "config.json").read_text())["config"]["seed"] == 5


def test_fresh_in_a_new_folder_leaves_nothing_beside_it(tmp_path, no_training):
    finished = launch_here(*TWO_RUNGS, f"--workdir={tmp_path / 'run'}", "--fresh")
    assert finished.error_line == no_training
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_held_out_split_chooses_the_best_epoch(tmp_path):
    launch_well(*rungs(32), "--config.data.validation_fraction=0.25", f"--workdir={tmp_path / 'run'}")
    content, rows = result(tmp_path / "run" / STAGES[0]), records(tmp_path / "run" / STAGES[0])
    assert content["selection"] == "validation" and content["num_train"] == 12
    best = max(rows, key=lambda row: (row["validation_top1"], -row["epoch"]))
    assert (content["best_epoch"], content["best_top1"]) == (best["epoch"], best["test_top1"])


@pytest.mark.slow
def test_a_chain_runs_where_memory_is_short(tmp_path):
    finished = launch_well(
        *TWO_RUNGS, "--config.train.remat=True", "--config.train.accumulation_steps=2", f"--workdir={tmp_path}"
    )
    assert "w1a1: epoch 2/2" in finished.stderr
    # What looks into the finished network sees its values.
    assert result(tmp_path / STAGES[1])["level_bits"] is not None and (tmp_path / STAGES[1] / "weights.npz").exists()


def test_computing_twice_is_refused_for_networks_without_blocks_before_training(tmp_path):
    options = ("--config.network=vgg_small", "--config.train.remat=True", f"--workdir={tmp_path / 'run'}")
    assert refused(launch_here(*TWO_RUNGS, *options)) == (
        "error: stage w32a32: remat with network 'vgg_small': accepted with networks that are made of blocks"
    )
    assert not (tmp_path / "run").exists()
