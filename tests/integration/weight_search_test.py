"""Weight Search through ``launch.py``: the chain of bits, killed and resumed; a list of values; what a run leaves."""

import csv
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
    result,
    saved_arrays,
    steps,
)

# Two epochs of two steps; a smaller network with the same kinds of layers.
SMALL = (
    f"--config={ROOT / 'configs' / 'weight_search_resnet20.py'}:smoke",
    "--config.network=resnet8",
    "--config.data.image_size=16",
)
CHAIN = (*SMALL, "--config.weight_search.by_bit=(0,1)")
STAGES = ("00_bit_0", "01_bit_1")
SEARCHED = {f"layer{stage}_0/conv{index}" for stage in (1, 2, 3) for index in (1, 2)}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a chain that nothing interrupted."""
    folder = tmp_path_factory.mktemp("weight_search") / "run"
    launch_well(*CHAIN, f"--workdir={folder}")
    return folder


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Command line of a finished search among three values, with soft and noisy training."""
    folder = tmp_path_factory.mktemp("weight_search") / "run"
    switches = ("values=(-1.0,0.0,1.0)", "soft=True", "noise=1.0", "noise_rate=0.5", "quantize_last=True")
    arguments = (*SMALL, *(f"--config.weight_search.{switch}" for switch in switches), f"--workdir={folder}")
    launch_well(*arguments)
    return arguments


def weights(stage: Path) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of ``weights.npz`` by layer."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    with np.load(stage / "weights.npz") as file:
        for name in file.files:
            layer, _, part = name.rpartition("/")
            layers.setdefault(layer, {})[part] = file[name]
    return layers


def test_a_further_bit_halves_some_of_the_weights_found_before(chain):
    first, second = (weights(chain / stage) for stage in STAGES)
    # The 1x1 shortcuts are searched, too.
    shortcuts = {f"layer{stage}_0/downsample_conv" for stage in (2, 3)}
    assert set(first) == set(second) == SEARCHED | shortcuts
    for layer, found in first.items():
        assert set(np.unique(found["kernel"])) == {-1.0, 1.0}
        factors = second[layer]["kernel"] / found["kernel"]
        assert set(np.unique(factors)) <= {0.5, 1.0}
    halved = np.mean(np.concatenate([np.abs(found["kernel"]).ravel() == 0.5 for found in second.values()]))
    assert 0 < halved < 1


def test_the_weights_are_those_of_the_last_checkpoint(chain):
    saved = saved_arrays(chain / "01_bit_1")
    for layer, found in weights(chain / "01_bit_1").items():
        logits, base = saved[f"params/{layer}/kernel"], saved[f"quant_state/{layer}/weight_quantizer/base"]
        assert logits.shape == (2, *found["kernel"].shape)
        np.testing.assert_array_equal(found["kernel"], np.where(logits[0] >= logits[1], 1.0, 0.5) * base)
        np.testing.assert_array_equal(found["levels"][found["indices"]] * found["scale"], found["kernel"])


def test_the_record_names_temperature_and_top_5_and_is_a_table_too(chain):
    rows = records(chain / "00_bit_0")
    assert [row["knob/temperature"] for row in rows] == [1.0, pytest.approx(0.97)]
    assert all(row["train_top5"] >= row["train_top1"] for row in rows)
    with (chain / "00_bit_0" / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["test_loss"]) for row in table] == [row["test_loss"] for row in rows]
    assert {"train_loss", "train_top1", "train_top5", "test_loss", "test_top1", "test_top5", "seconds"} <= set(table[0])


def test_the_bits_of_each_stage_are_those_of_its_values(chain):
    sizes = [result(chain / stage) for stage in STAGES]
    assert [size["bits"] for size in sizes] == [1.0, 2.0]
    assert sizes[1]["quantized_weight_bits"] == 2 * sizes[0]["quantized_weight_bits"]
    assert [size["level_bits"] for size in sizes] == [1, 2]


@pytest.mark.slow
def test_a_chain_killed_in_its_second_bit_goes_on_to_the_same_bits(tmp_path, chain):
    # Four checkpoints a stage: the seventh is that of step 3 of the second, in the middle of its second epoch.
    launch_killed("saved", 7, *CHAIN, SAVE_ALWAYS, f"--workdir={tmp_path}")
    assert steps(tmp_path / "01_bit_1")[-1] == 3
    assert not (tmp_path / "01_bit_1" / "weights.npz").exists()
    finished = launch_well(*CHAIN, f"--workdir={tmp_path}")
    assert "stage bit_1: going on from step 3" in finished.stderr
    assert_same_run(tmp_path, chain, STAGES)
    for stage in STAGES:
        found, expected = (weights(folder / stage) for folder in (tmp_path, chain))
        for layer in expected:
            np.testing.assert_array_equal(found[layer]["kernel"], expected[layer]["kernel"])


def test_a_list_of_values_on_the_command_line_is_searched(ternary):
    folder = Path(ternary[-1].removeprefix("--workdir="))
    found = weights(folder / "00_search")
    assert "fc" in found
    for layer in found.values():
        np.testing.assert_array_equal(layer["levels"], [-1.0, 0.0, 1.0])
    content = json.loads((folder / "config.json").read_text())
    assert content["config"]["weight_search"]["values"] == [-1.0, 0.0, 1.0]
    assert result(folder / "00_search")["bits"] == pytest.approx(np.log2(3))
    assert [row["knob/noise"] for row in records(folder / "00_search")] == [1.0, 0.5]


def test_evaluation_needs_no_random_number_and_repeats_the_last_epoch(ternary):
    finished = launch_well(*ternary, "--mode=evaluate", "--json")
    last = result(Path(ternary[-1].removeprefix("--workdir=")) / "00_search")
    assert finished.last_json["top1"] == last["last_top1"]
    assert finished.last_json["loss"] == pytest.approx(last["last_loss"], rel=1e-6)


def test_report_draws_the_accuracies(ternary):
    pytest.importorskip("matplotlib")
    finished = launch_well(*ternary, "--mode=report", "--json")
    assert [Path(path).name for path in finished.last_json["pictures"]] == [
        *("chain.png", "accuracies.png", "confusion.png", "mistakes.png")
    ]
    with PIL.Image.open(finished.last_json["pictures"][1]) as image:
        assert min(image.size) > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config.weight_search.values=2b",), "config.weight_search.values='2b': accepted are 1b, po2-2b"),
        (("--config.weight_search.values=(1.0,1.0)",), "config.weight_search.values=(1.0, 1.0): accepted are 1b"),
        (("--config.weight_search.by_bit=(1,)",), "config.weight_search.by_bit=(1,): accepted is a tuple of int, 0, 1"),
        (("--config.extra_objectives=('feature_swap',)",), "config.extra_objectives: 'feature_swap' needs real-valued"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, arguments, message):
    line = refused(launch_here(*SMALL, *arguments, f"--workdir={tmp_path / 'run'}"))
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()
