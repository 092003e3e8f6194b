"""A run that starts from the weights of another one, of other classes, with a part of them frozen."""

import numpy as np
import pytest

from tests.integration.launching import STAGES, TWO_RUNGS, launch_here, launch_well, refused, rungs, saved_arrays

START = (*rungs(1, epochs=1), "--config.data.num_classes=3")
FREEZE = "--config.freeze=('conv1','layer1_0')"


def test_a_run_starts_from_another_with_new_classes_and_frozen_layers(two_rungs, tmp_path):
    source = two_rungs / STAGES[0]
    finished = launch_well(*START, f"--config.init_from=file:{source}", FREEZE, f"--workdir={tmp_path / 'run'}")
    assert "the classifier 'fc' is made new: 10 classes there, 3 here" in finished.stderr
    before, after = saved_arrays(source), saved_arrays(tmp_path / "run" / "00_w1a1")
    shared = [path for path in before if path in after and path.startswith(("params/", "batch_stats/"))]
    for path in shared:
        frozen = path.split("/")[1] in ("conv1", "layer1_0")
        equal = before[path].shape == after[path].shape and np.array_equal(before[path], after[path])
        assert equal or not frozen, path
    assert after["params/fc/kernel"].shape[-1] == 3


@pytest.mark.slow
def test_a_run_starts_from_an_exported_network(two_rungs, tmp_path):
    exported = tmp_path / "network.bnn"
    launch_well(*TWO_RUNGS, f"--workdir={two_rungs}", "--mode=export", f"--output={exported}")
    finished = launch_well(*START, f"--config.init_from=file:{exported}", f"--workdir={tmp_path / 'run'}")
    assert f"starts from {exported}" in finished.stderr and "10 classes there, 3 here" in finished.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--config.init_from=file:absent.pth",), "init_from 'file:absent.pth': no such file or folder"),
        (("--config.init_from=absent.pth",), "config.init_from='absent.pth': accepted is str, 'file:PATH'"),
        (("--config.freeze=('layer1.0',)",), "config.freeze: 'layer1.0' matches no parameter; near are layer1_0"),
        (("--config.freeze=('**',)",), "config.freeze=('**',): nothing is left to train in stage w1a1"),
    ],
)
def test_a_mistake_is_one_line_before_training(tmp_path, options, words):
    assert words in refused(launch_here(*START, *options, f"--workdir={tmp_path}"))


def test_a_run_of_several_stages_is_refused_with_their_names(two_rungs, tmp_path):
    line = refused(launch_here(*START, f"--config.init_from=file:{two_rungs}", f"--workdir={tmp_path}"))
    assert all(stage in line for stage in STAGES)
