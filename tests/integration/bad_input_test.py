"""Mistakes of a user: one line that begins with 'error:', no traceback, exit status 2, before anything is trained."""

import errno
import os
from pathlib import Path

import pytest

from bnn_jax.data import memory
from bnn_jax.training import metrics
from tests.conftest import ROOT
from tests.integration.launching import (
    QUICKSTART,
    STAGES,
    TWO_RUNGS,
    Finished,
    damage,
    launch_here,
    launch_program,
    records,
    refused,
    rungs,
    steps,
)

DIGITS = f"--config={ROOT / 'configs' / 'quickstart.py'}"
RESNET20 = f"--config={ROOT / 'configs' / 'asbq_resnet20.py'}"
IMAGENET = f"--config={ROOT / 'configs' / 'asbq_resnet18.py'}"


# ---- the command line and the config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["--config is missing", "--help"]),
        (("--config=configs/nowhere.py",), ["configs/nowhere.py", "is no Python file"]),
        (("--config=configs",), ["--config=configs", "is no Python file"]),
        ((QUICKSTART + "r",), ["smoker", "accepted behind the colon is 'smoke'"]),
        ((QUICKSTART, "--folder=x"), ["'folder'", "--help lists the options"]),
        ((QUICKSTART, "train"), ["'train' is no option"]),
        ((QUICKSTART, "--mode=test"), ["--mode=test", "accepted are train, evaluate, summary, report"]),
        ((QUICKSTART, "--json=x"), ["--json=x"]),
        # unknown keys
        (
            (QUICKSTART, "--config.train.batchsize=8"),
            ["--config.train.batchsize", "did you mean config.train.batch_size?"],
        ),
        ((QUICKSTART, "--config.sedd=8"), ["--config.sedd", "did you mean config.seed?"]),
        (
            (QUICKSTART, "--config.train.clip=8"),
            ["--config.train.clip: unknown key; did you mean config.train.gradient_clip_norm?"],
        ),
        ((QUICKSTART, "--config.train=8"), ["--config.train: unknown key", "train.batch_size"]),
        # wrong types
        ((QUICKSTART, "--config.train.batch_size=many"), ["--config.train.batch_size=many", "accepted is int"]),
        ((QUICKSTART, "--config.train.batch_size=1.5"), ["--config.train.batch_size=1.5", "accepted is int"]),
        ((QUICKSTART, "--config.train.nesterov=perhaps"), ["--config.train.nesterov=perhaps", "accepted is bool"]),
        ((QUICKSTART, "--config.asbq.kd_weight=half"), ["--config.asbq.kd_weight=half", "accepted is float"]),
        ((QUICKSTART, "--config.train.batch_size=0"), ["config.train.batch_size=0", "1 to 100,000,000"]),
        # values that cannot be meant
        ((QUICKSTART, "--workdir="), ["--workdir= is empty: accepted is a folder"]),
        ((QUICKSTART, "--stage="), ["--stage= is empty: accepted is the name of a stage"]),
        (
            (QUICKSTART, "--mode=evaluate", "--checkpoint="),
            ["--checkpoint= is empty: accepted is a file or folder"],
        ),
        ((QUICKSTART, "--config.data.data_dir="), ["config.data.data_dir=''", "not empty"]),
        (
            (QUICKSTART, "--config.train.batch_size=100000000000"),
            ["config.train.batch_size=100000000000: accepted is int, 1 to 100,000,000"],
        ),
        (
            (QUICKSTART, "--config.data.image_size=100000"),
            ["config.data.image_size=100000", "24 images of 100000x100000x3 take 671 GiB: accepted are "],
        ),
        ((QUICKSTART, "--config.data.num_train=1000000000000"), ["num_train=1000000000000", " GiB: accepted are "]),
        # bit widths and combinations
        ((QUICKSTART, "--config.asbq.bits=(32,16)"), ["config.asbq.bits=(32, 16)", "falling sequence of 32, 8 to 1"]),
        ((QUICKSTART, "--config.asbq.bits=(1,32)"), ["config.asbq.bits=(1, 32)", "falling sequence of 32, 8 to 1"]),
        (
            (QUICKSTART, "--config.asbq.bits=(32,1)"),
            ["config.asbq.learning_rates=", "each of the rungs (32, 1)"],
        ),
        ((QUICKSTART, "--config.asbq.block=imagenet"), ["config.asbq.block='imagenet'", "'release', 'checkpoint'"]),
        ((IMAGENET, "--config.asbq.preset=checkpoint"), ["config.asbq.block='checkpoint'", "'resnet18' is 'imagenet'"]),
        # names
        ((QUICKSTART, "--config.network=resnet21"), ["config.network='resnet21'", "accepted are resnet8, "]),
        ((QUICKSTART, "--config.data.name=mnits"), ["config.data.name='mnits'", "accepted are "]),
        ((QUICKSTART, "--config.method=bnn"), ["config.method='bnn'", "accepted are asbq"]),
        ((QUICKSTART, "--stage=w3a3"), ["--stage=w3a3", "accepted are w32a32, w8a8, w4a4, w2a2, w1a1"]),
        # data that are not there, or do not fit
        ((RESNET20, "--config.data.image_size=16"), ["config.data.image_size=16", "cifar10 has no such option"]),
        (
            (IMAGENET, "--config.data.data_dir=/no/such/folder"),
            ["imagenet2012 is not prepared in /no/such/folder", "config.data.name='imagenet2012_resized'"],
        ),
        ((DIGITS, "--config.data.num_train=100000"), ["config.data.num_train=100000", "accepted are 1 to "]),
        ((QUICKSTART, "--config.data.validation_fraction=0.01"), ["config.data.validation_fraction=0.01"]),
        (
            (QUICKSTART, "--config.network=vgg_small", "--config.data.image_size=4"),
            ["network 'vgg_small' with images of 4x4x3: they are too small; accepted are 8x8 and larger"],
        ),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(arguments, words, tmp_path):
    # Of an option that is given twice the last one counts.
    line = refused(launch_here(*arguments[:1], f"--workdir={tmp_path / 'run'}", *arguments[1:]))
    for word in words:
        assert word in line


@pytest.mark.parametrize("mode", ["summary", "evaluate"])
@pytest.mark.parametrize(
    ("network", "option", "words"),
    [
        ("vgg_small", "data.image_size=4", "network 'vgg_small' with images of 4x4x3: they are too small"),
        ("resnet21", "seed=0", "config.network='resnet21'"),
    ],
)
def test_a_network_that_cannot_be_built_is_one_line_without_training_too(mode, network, option, words, tmp_path):
    arguments = [QUICKSTART, f"--config.network={network}", f"--config.{option}", f"--mode={mode}"]
    if mode == "evaluate":
        arguments.append(f"--checkpoint={tmp_path}")
    assert words in refused(launch_here(*arguments))


def test_a_quantizer_that_does_not_fit_a_layer_is_one_line(tmp_path):
    config = f"--config={ROOT / 'configs' / 'snn_resnet20.py'}:smoke"
    network = ("--config.network=standard_resnet50", "--config.data.image_size=64")
    line = refused(launch_here(config, *network, "--mode=summary", f"--workdir={tmp_path / 'run'}"))
    assert "stage sub_bit: network 'standard_resnet50'" in line
    assert "codebook quantizer: kernel 1x1x64x64: accepted are 3x3 convolutions" in line


def test_a_mistake_is_one_line_for_a_user_too(tmp_path):
    finished = launch_program(QUICKSTART, "--config.train.batchsize=8", f"--workdir={tmp_path}")
    assert finished.code == 2
    assert finished.stdout == ""
    assert finished.stderr == "error: --config.train.batchsize: unknown key; did you mean config.train.batch_size?\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def get_config(:", ["SyntaxError"]),
        ("import no_such_module", ["ModuleNotFoundError: No module named 'no_such_module'"]),
        ("x = 1", ["AttributeError", "get_config"]),
        ("def get_config(argument=''):\n    return {}", ["must return a ConfigDict, not dict"]),
        ("def get_config(argument=''):\n    raise RuntimeError('two\\nlines')", ["RuntimeError: two lines"]),
        ("import sys\nsys.exit(3)", ["SystemExit: 3"]),
        ("def get_config(argument=''):\n    exit()", ["SystemExit: None"]),
    ],
)
def test_a_config_file_with_a_mistake_is_named(tmp_path, content, words):
    (tmp_path / "mine.py").write_text(content)
    line = refused(launch_here(f"--config={tmp_path / 'mine.py'}"))
    assert str(tmp_path / "mine.py") in line
    for word in words:
        assert word in line


def test_a_data_set_that_is_not_prepared_is_named_with_the_command_that_prepares_it(tmp_path):
    line = refused(launch_here(RESNET20, f"--config.data.data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"))
    assert "cifar10" in line and str(tmp_path) in line
    assert "python -m bnn_jax.data.prepare cifar10" in line


def test_after_a_mistake_about_the_data_the_folder_is_free_for_a_corrected_config(tmp_path):
    digits = (DIGITS, "--config.asbq.bits=(32,)", "--config.asbq.learning_rates=(0.1,)")
    wrong = launch_here(*digits, "--config.data.num_train=100000", f"--workdir={tmp_path / 'run'}")
    assert "config.data.num_train" in refused(wrong)
    # The corrected run is stopped by another mistake: this is only about the folder.
    again = launch_here(*digits, "--config.data.num_eval=100000", f"--workdir={tmp_path / 'run'}")
    assert "config.data.num_eval=100000" in refused(again)


def test_images_of_which_no_batch_finds_room_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_size", lambda: 16 * 16 * 16 * 3 * 2)
    line = refused(launch_here(*rungs(32), "--config.train.batch_size=16", f"--workdir={tmp_path / 'run'}"))
    assert "config.train.batch_size, config.data.image_size: 16 images of 16x16x3 take 0 GiB: accepted are 0" in line


def test_memory_that_is_used_up_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError("Unable to allocate 447. GiB for an array")

    monkeypatch.setattr(memory, "_generate", full)
    line = refused(launch_here(*rungs(32), f"--workdir={tmp_path / 'run'}"))
    assert line == "error: not enough memory: Unable to allocate 447. GiB for an array"


@pytest.mark.parametrize("inside", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_made_is_named(tmp_path, inside):
    (tmp_path / "file").write_text("")
    assert f"--workdir={tmp_path / inside}" in refused(launch_here(*TWO_RUNGS, f"--workdir={tmp_path / inside}"))


def test_a_full_disk_is_named_as_such(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "metrics.jsonl"))

    monkeypatch.setattr(metrics, "append", full)
    finished = launch_here(*TWO_RUNGS, f"--workdir={tmp_path / 'run'}")
    assert finished.code == 2
    assert finished.error_line == f"error: {tmp_path / 'metrics.jsonl'}: no space left on the device"


# ---- checkpoints


def evaluate(*arguments: str) -> Finished:
    return launch_here(*TWO_RUNGS, "--mode=evaluate", *arguments)


def test_nothing_trained_is_nothing_to_evaluate_or_report(tmp_path):
    assert "no finished stage to evaluate" in refused(evaluate(f"--workdir={tmp_path}"))
    assert "no checkpoint" in refused(evaluate(f"--workdir={tmp_path}", "--stage=w1a1"))
    assert "no finished stage to report" in refused(launch_here(*TWO_RUNGS, "--mode=report", f"--workdir={tmp_path}"))


@pytest.mark.parametrize("stage", ["w3a3", "w1a1@first"])
def test_a_stage_that_is_not_there_is_refused(two_rungs, stage):
    assert "accepted" in refused(evaluate(f"--workdir={two_rungs}", f"--stage={stage}"))


@pytest.mark.parametrize("mode", ["train", "evaluate", "report"])
def test_the_run_folder_of_another_config_is_refused(two_rungs, mode):
    # The trees of variables agree: only the config tells that other quantizers were trained.
    line = refused(launch_here(*TWO_RUNGS, "--config.asbq.w1=levels", f"--mode={mode}", f"--workdir={two_rungs}"))
    assert f'{two_rungs} holds a run of another config: config.asbq.w1: null -> "levels"' in line


@pytest.mark.parametrize(
    ("name", "content"),
    [("net.pth", b"hello\n"), ("net.pth.tar", b""), ("notes.txt", b"hello\n"), ("net.th", b"PK\x03\x04 cut off")],
)
def test_a_checkpoint_that_is_some_other_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refused(evaluate(f"--checkpoint={tmp_path / name}"))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    assert f"--checkpoint={tmp_path / 'net.pth'}: no such" in refused(evaluate(f"--checkpoint={tmp_path / 'net.pth'}"))


def test_a_folder_without_checkpoints_is_named(tmp_path):
    assert str(tmp_path) in refused(evaluate(f"--checkpoint={tmp_path}"))


def test_the_folder_of_a_whole_run_is_refused_with_its_stages(two_rungs):
    line = refused(evaluate(f"--checkpoint={two_rungs}"))
    assert all(stage in line for stage in STAGES)


def test_a_checkpoint_of_another_network_is_refused_with_what_differs(two_rungs):
    line = refused(evaluate("--config.network=resnet14", f"--checkpoint={two_rungs / STAGES[1]}"))
    assert "checkpoint of another network: params/layer1_1/" in line
    assert str(two_rungs / STAGES[1]) in line


def test_a_damaged_checkpoint_is_named_if_it_was_asked_for(two_rungs, copy_of):
    stage = copy_of(two_rungs) / STAGES[1]
    damage(stage / "checkpoints" / "4" / "params")
    line = refused(evaluate(f"--checkpoint={stage / 'checkpoints' / '4'}"))
    assert "damaged checkpoint" in line and str(stage / "checkpoints" / "4") in line


def test_with_every_checkpoint_damaged_nothing_is_trained_over_them(two_rungs, copy_of):
    folder = copy_of(two_rungs)
    (folder / STAGES[1] / "result.json").unlink()
    for step in steps(folder / STAGES[1]):
        damage(folder / STAGES[1] / "checkpoints" / str(step))
    line = refused(launch_here(*TWO_RUNGS, f"--workdir={folder}"))
    assert "damaged" in line and str(folder / STAGES[1]) in line


@pytest.mark.parametrize("name", ["config.json", f"{STAGES[0]}/result.json"])
def test_a_damaged_file_of_the_run_folder_is_named(two_rungs, copy_of, name):
    folder = copy_of(two_rungs)
    (folder / name).write_text('{"config": ')
    assert f"{folder / name} is damaged" in refused(launch_here(*TWO_RUNGS, f"--workdir={folder}"))


# ---- training that fails


def test_a_loss_that_is_not_finite_ends_with_status_1_and_says_what_is_left(tmp_path):
    # The second epoch's rate throws the weights out of the range of float32.
    explodes = ("--config.asbq.learning_rate_boundaries=(1.0,)", "--config.asbq.learning_rate_factors=(1.0,1e30)")
    finished = launch_here(*rungs(32), *explodes, f"--workdir={tmp_path}")
    assert finished.code == 1, finished.stderr
    line, (record,) = finished.error_line, records(tmp_path / STAGES[0])
    assert "stage w32a32: the loss is not finite at step 3; last metrics: {'epoch': 0, " in line
    assert f"'train_loss': {record['train_loss']}, 'test_top1': {record['test_top1']}" in line
    assert f"last good checkpoint: step 2 in {tmp_path / STAGES[0] / 'checkpoints'}" in line
    assert steps(tmp_path / STAGES[0]) == [2]
    assert not (tmp_path / STAGES[0] / "result.json").exists()
