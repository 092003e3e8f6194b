"""The checks of SNN's networks and training runs can fail: files made with the library itself, one number changed."""

import pathlib
import re
from collections.abc import Callable

import numpy as np
import pytest

from tests.golden.checks_fail_test import Recorder
from tests.golden.comparison import Comparison, GoldenFile, GoldenMismatch
from tests.golden.snn.checks_fail_test import DATA, arrays_of, changed, run_check, save
from tests.golden.snn.networks import check_blocks, check_model, full_shapes
from tests.golden.snn.trajectory import check_trajectory

CLASSES, SIDE, WIDTHS = 3, 16, (4, 6)


def made_state(*, tau: int | None) -> dict[str, np.ndarray]:
    """A random state of a network of two blocks by PyTorch's names."""
    random = np.random.RandomState(0)
    sizes = {"conv1.weight": 147 * WIDTHS[0], "bn1.weight": WIDTHS[0], "bn1.bias": WIDTHS[0]}
    for stage, (before, width) in enumerate(zip((WIDTHS[0], *WIDTHS), WIDTHS), start=1):
        block = f"layer{stage}.0."
        sizes[f"{block}move0.bias"] = before
        sizes[f"{block}binary_conv.weight"] = 9 * before * width
        if tau is not None:
            sizes[f"{block}binary_conv.binarize.patterns"] = 9 * 2**tau
        leaves = ("bn1.weight", "bn1.bias", "move1.bias", "prelu.weight", "move2.bias")
        sizes |= {f"{block}{leaf}": width for leaf in leaves}
        if width != before:
            sizes[f"{block}downsample.1.weight"] = before * width
            sizes |= {f"{block}downsample.2.{leaf}": width for leaf in ("weight", "bias")}
    sizes |= {"fc.weight": CLASSES * WIDTHS[-1], "fc.bias": CLASSES}
    state = {}
    for name, shape in full_shapes(sizes).items():
        z = random.normal(0, 0.3, shape).astype(np.float32)
        state[name] = np.sign(z) if name.endswith("patterns") else z
        if re.search(r"(bn1|downsample\.2)\.weight$", name):
            state[name] = 1 + z
            norm = name.removesuffix("weight")
            state |= {
                f"{norm}running_mean": np.zeros(shape, np.float32),
                f"{norm}running_var": np.ones(shape, np.float32),
            }
    return state


def completed(path: pathlib.Path, arrays: dict[str, np.ndarray], check: Callable) -> dict[str, np.ndarray]:
    """The arrays with those that a check compares replaced by the library's own."""
    recorder = Recorder()
    check(GoldenFile(save(path.parent, path.name, arrays)), recorder)
    return {name: recorder.values.get(name, array).astype(array.dtype) for name, array in arrays.items()}


def assert_changes_are_found(folder: pathlib.Path, kind: str, arrays: dict[str, np.ndarray], names: list[str]) -> None:
    """The arrays pass as they are; changed, all of them are named."""
    run_check(save(folder, kind, arrays))
    wrong = {name: changed(arrays[name], 0.5) for name in names}
    with pytest.raises(GoldenMismatch) as caught:
        run_check(save(folder, kind, {**arrays, **wrong}))
    assert [name for name in names if name not in caught.value.found] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model_s1", "model_s2_refine"])
def test_changes_in_a_pass_of_a_network_are_found(tmp_path, kind: str) -> None:
    random, state = np.random.RandomState(1), made_state(tau=None if kind == "model_s1" else 4)
    parameters = {name: array for name, array in state.items() if "running_" not in name}
    kept = {name: array for name, array in state.items() if re.search("running_|patterns", name)}
    arrays = {
        "x": random.normal(size=(4, 3, SIDE, SIDE)).astype(np.float32),
        "dx": np.zeros((4, 3, SIDE, SIDE), np.float32),
        "teacher_logits": random.normal(size=(4, CLASSES)).astype(np.float32),
        **{name: np.zeros((4, CLASSES), np.float32) for name in ("logits", "logits_eval")},
        "loss": np.zeros((), np.float32),
        **{f"in.{name}": array for name, array in state.items()},
        **{f"grad.{name}": array for name, array in parameters.items()},
        **{f"out.{name}": array for name, array in kept.items()},
    }
    arrays = completed(tmp_path / kind, arrays, check_model)
    names = ["dx", "logits", "logits_eval", "loss"]
    names += [name for name in arrays if name.startswith(("grad.", "out."))]
    assert_changes_are_found(tmp_path, kind, arrays, names)


@pytest.mark.slow
def test_changes_in_a_training_run_are_found(tmp_path) -> None:
    random, state = np.random.RandomState(2), made_state(tau=4)
    steps, batches, rows = 4, 2, 5
    arrays = {
        "x": random.normal(size=(batches, rows, 3, SIDE, SIDE)).astype(np.float32),
        "teacher_logits": random.normal(size=(batches, rows, CLASSES)).astype(np.float32),
        "logits": np.zeros((steps, rows, CLASSES), np.float32),
        "loss": np.zeros(steps, np.float32),
        "lr": np.zeros(steps, np.float32),
        "logits_eval": np.zeros((rows, CLASSES), np.float32),
        "wd": np.array(1e-2, np.float32),
        "lr0": np.array(1e-3, np.float32),
        "step0": np.array(23),
        **{f"{place}.{name}": array for place in ("in", "after1", "end") for name, array in state.items()},
    }
    arrays = completed(tmp_path / "traj_s2_wd", arrays, check_trajectory)
    # Refined in the second step, of which there are two to an epoch; the last epoch has the rate 0.
    np.testing.assert_allclose(arrays["lr"], [5e-4, 5e-4, 0, 0])
    patterns = [f"{place}.layer1.0.binary_conv.binarize.patterns" for place in ("in", "after1", "end")]
    first, second, last = (arrays[name] for name in patterns)
    assert np.array_equal(first, second) and not np.array_equal(first, last)
    names = ["logits", "loss", "lr", "logits_eval", *(name for name in arrays if name.startswith(("after1.", "end.")))]
    assert_changes_are_found(tmp_path, "traj_s2_wd", arrays, names)


def test_changes_of_the_published_network_are_found(tmp_path) -> None:
    arrays = arrays_of("full_resnet18", "")
    names = ["logits_train", "stage1_mean", "stage4_std", "stage2_shape", "out.layer4.3.bn1.running_var"]
    wrong = {name: changed(arrays[name], 100) for name in names}
    wrong["decay"] = np.where(np.arange(len(arrays["decay"])) == 3, ~arrays["decay"], arrays["decay"])
    assert str(arrays["param_names"][3]) == "layer1.0.move0.bias"
    with pytest.raises(GoldenMismatch) as caught:
        run_check(save(tmp_path, "full_resnet18", {**arrays, **wrong}))
    assert sorted(caught.value.found) == sorted(wrong)


def test_a_gradient_that_should_not_be_there_is_found(tmp_path) -> None:
    # Of the codebooks of a step without refinement.
    with np.load(DATA / "block_s2.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name.startswith("c0_")}
    arrays["c0_step_before"] = np.array(24)
    result = Comparison()
    check_blocks(GoldenFile(save(tmp_path, "block_s2", arrays)), result)
    bad = [row.what for row in result.rows if row.ratio > 1]
    assert bad == ["c0_grad.params/conv1/weight_quantizer/codebook"]
