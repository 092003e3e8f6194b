"""SNN through ``launch.py``: the whole chain, killed and resumed between refinements, evaluated, and refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnn_jax.experiment.build import make_experiment, set_up
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import SavedVariables, load_images
from bnn_jax.experiment.start import first_variables
from bnn_jax.ops import codebook as ops
from configs.snn_resnet20 import get_config
from tests.conftest import ROOT
from tests.integration.launching import (
    SAVE_ALWAYS,
    assert_same_arrays,
    assert_same_run,
    launch_here,
    launch_killed,
    launch_well,
    records,
    refused,
    result,
    saved_arrays,
    steps,
)

CONFIG = f"--config={ROOT / 'configs' / 'snn_resnet20.py'}:smoke"
# Small networks and images. Two steps an epoch, the codebooks refined in every second one; the rate, so large that
# signs of codebooks turn and duplicates arise, falls from 2/3 by 1/3 each epoch.
OVERRIDES = {
    "network": "reactnet8",
    "data.image_size": 8,
    "snn.teacher_network": "resnet8",
    "snn.tau": 6,
    "snn.epochs": (1, 3),
    "snn.learning_rate": 1.0,
}
FLAGS = tuple(f"--config.{key}={value}" for key, value in OVERRIDES.items())
CHAIN = (CONFIG, *FLAGS)
STAGES = ("00_teacher", "01_binary_activations", "02_sub_bit")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("snn") / "run"
    launch_well(*CHAIN, f"--workdir={folder}")
    return folder


def codebooks(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path: array for path, array in arrays.items() if path.startswith("params/") and path.endswith("codebook")}


def test_the_chain_trains_its_three_stages(whole):
    teacher, first, second = (result(whole / stage) for stage in STAGES)
    assert [r["bits"] for r in (teacher, first, second)] == [32.0, 32.0, pytest.approx(6 / 9)]
    # ReActNet-8 has 73,728 weights in its six 3x3 convolutions, a kernel for nine of them.
    assert [r["quantized_weight_bits"] for r in (teacher, first, second)] == [0, 0, 6 * 73_728 // 9]
    assert [r["steps"] for r in (teacher, first, second)] == [2, 2, 6]
    assert {name for name in records(whole / STAGES[2])[0] if name.startswith("loss/")} == {"loss/distillation"}


def test_sub_bit_weights_start_where_binary_activations_ended(whole):
    config = get_config("smoke")
    config.update_from_flattened_dict(OVERRIDES)
    experiment = make_experiment(validate(config.to_dict()))
    stage = experiment.stages[2]
    setup = set_up(experiment, stage, load_images(experiment.config, stage.data))
    saved = SavedVariables(experiment, RunFolder(whole, experiment.stages))
    initial = flatten_dict(first_variables(setup, saved.inherited_by(setup))[0], sep="/")
    before = saved_arrays(whole / STAGES[1])
    before = {path: array for path, array in before.items() if path.startswith(("params/", "batch_stats/"))}
    for path, array in before.items():
        np.testing.assert_array_equal(initial[path], array, err_msg=path)
    # New are the codebooks, different random patterns in each layer, and their memories; knobs are no weights.
    new = {path: array for path, array in initial.items() if path not in before and not path.startswith("knobs/")}
    new = {path: np.asarray(array) for path, array in new.items()}
    assert {path.rpartition("/")[2] for path in new} == {"codebook", "memory"} and len(new) == 12
    books = codebooks(new)
    assert all(len(np.unique(book, axis=0)) == 64 and set(book.flat) == {-1, 1} for book in books.values())
    assert len({book.tobytes() for book in books.values()}) == 6


def test_refined_codebooks_keep_different_patterns(whole):
    arrays = saved_arrays(whole / STAGES[2])
    replaced = 0
    for path, codebook in codebooks(arrays).items():
        assert codebook.shape == (64, 9) and np.abs(codebook).max() <= 3
        # The last step refined, at the rate 0: nothing moved a codebook after its duplicates were replaced.
        assert len(set(np.asarray(ops.codes(codebook)).tolist())) == 64, path
        new = np.all(np.abs(codebook) == 1, axis=1)
        replaced += int(new.sum())
        memory = arrays[path.replace("params/", "quant_state/").replace("codebook", "memory")]
        np.testing.assert_array_equal(memory[new], codebook[new])
    # Rows that were never replaced have moved away from -1 and +1.
    assert 0 < replaced < 6 * 64


@pytest.mark.slow
def test_a_run_killed_between_two_refinements_goes_on_to_the_same_bits(tmp_path, whole):
    # Of the checkpoints of every step, two are the teacher's and two of the first step: the seventh is that of step 3.
    launch_killed("saved", 7, *CHAIN, SAVE_ALWAYS, f"--workdir={tmp_path}")
    assert steps(tmp_path / STAGES[2])[-1] == 3
    before, after = (saved_arrays(folder / STAGES[2]) for folder in (tmp_path, whole))
    moved = [path for path, codebook in codebooks(before).items() if not np.array_equal(codebook, after[path])]
    assert len(moved) == 6
    # The codebooks' own clock: refined once, in step 2, and then one step without a gradient.
    counts = {path: value for path, value in before.items() if path.startswith("opt_state/") and path.endswith("count")}
    assert {int(value) for value in counts.values()} == {2, 3}
    finished = launch_well(*CHAIN, f"--workdir={tmp_path}")
    assert "stage sub_bit: going on from step 3" in finished.stderr
    assert_same_run(tmp_path, whole, STAGES)


@pytest.mark.slow
def test_a_teacher_out_of_a_file_teaches_as_the_stage_does(tmp_path, whole):
    launch_well(*CHAIN, f"--config.snn.teacher=file:{whole / STAGES[0]}", f"--workdir={tmp_path}")
    for stage in STAGES[1:]:
        here = tmp_path / f"{int(stage[:2]) - 1:02d}{stage[2:]}"
        assert records(here) == records(whole / stage)
        assert_same_arrays(saved_arrays(here), saved_arrays(whole / stage))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_evaluation_changes_nothing(whole):
    before = contents(whole)
    first, second = (launch_here(*CHAIN, f"--workdir={whole}", "--mode=evaluate", "--json") for _ in range(2))
    assert first.code == second.code == 0, first.stderr
    assert first.last_json == second.last_json
    assert first.last_json["stage"] == "sub_bit"
    assert first.last_json["loss"] == pytest.approx(result(whole / STAGES[2])["last_loss"], rel=1e-6)
    assert contents(whole) == before


@pytest.mark.slow
def test_the_last_step_can_be_taught_by_itself_too(tmp_path):
    config = f"--config={ROOT / 'configs' / 'snn_skd_resnet20.py'}:smoke"
    launch_well(config, *FLAGS, f"--workdir={tmp_path}")
    first, last = (records(tmp_path / stage)[-1] for stage in STAGES[1:])
    added = {"loss/feature_swap", "loss/label_bank", "loss/cluster"}
    assert not added & set(first)
    assert all(last[name] > 0 for name in (*added, "loss/distillation"))


# ---- mistakes, before anything is trained


def test_a_teacher_without_its_file_is_refused(tmp_path):
    config = f"--config={ROOT / 'configs' / 'snn_resnet18.py'}"
    line = refused(launch_here(config, "--config.data.name=synthetic", f"--workdir={tmp_path}"))
    message = "stage binary_activations: teacher 'file:resnet34-b627a593.pth': no such file or folder"
    assert line == f"error: {message}"


def test_a_network_without_3x3_convolutions_is_refused(tmp_path):
    line = refused(launch_here(CONFIG, "--config.network=hardtanh_mlp", f"--workdir={tmp_path}"))
    assert line.startswith("error: stage sub_bit: network 'hardtanh_mlp' with images of 32x32x3: ")
    assert "accepted are 3x3 convolutions" in line


@pytest.mark.parametrize("tau", [0, 10])
def test_a_codebook_of_another_size_is_refused(tmp_path, tau):
    line = refused(launch_here(CONFIG, f"--config.snn.tau={tau}", f"--workdir={tmp_path}"))
    assert line == f"error: config.snn.tau={tau}: accepted is int, 1 to 9"
