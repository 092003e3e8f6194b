"""The Weight Search checks can fail: one changed number in a file of each kind is found."""

import pathlib

import numpy as np
import pytest

from tests.golden import golden_test
from tests.golden.comparison import Comparison, GoldenFile, GoldenMismatch
from tests.golden.weight_search import training
from tests.golden.weight_search.parts import PUBLISHED, check_published_curves

DATA = golden_test.COMMITTED / "weight_search"

# File, the arrays to change, by how much: a few tolerances, or one.
CHANGES = [
    ("categorical_po2-3b", ["index"], 1),
    ("categorical_po2-3b", ["values"], 1e-6),
    ("categorical_po2-3b", ["prob", "w_soft"], 1e-5),
    ("categorical_po2-3b", ["w_hard"], 1e-6),
    ("categorical_po2-3b", ["galpha_hard", "galpha_soft"], 1e-2),
    ("gumbel", ["ncases"], 1),
    ("gumbel", ["c0_w_hard", "c1_w_soft", "c2_galpha_hard", "c3_galpha_soft"], 1e-2),
    ("layer_po2-2b", ["nconv"], 1),
    ("layer_po2-2b", [f"conv1_{x}" for x in ("w", "y", "gx", "galpha", "y_soft_train", "y_soft_eval")], 1e-1),
    ("layer_po2-2b", [f"lin_{x}" for x in ("y", "gx", "galpha", "gbias")], 1e-1),
    ("by_bit", ["ab0_init_weight"], 0.5),
    ("by_bit", [f"ab1_{x}" for x in ("w", "y", "gx", "galpha", "w_fresh")], 1e-1),
    ("optimizer", ["quantsgd_counts"], 1),
    ("optimizer", ["sgd_vgg/2.alpha", "q_nesterov/3.bias", "q_damp/0.weight"], 1e-2),
    ("optimizer", ["q_frozen/3.alpha"], 1e-2),
    ("schedules", ["resnet18-lqnet/temp", "vggsmall-200/lr_epoch", "perbatch_lr0.02_total35"], 1e-4),
]


def check(path: pathlib.Path) -> None:
    golden_test.check_file(path, lambda name, line: None)


def arrays_of(kind: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{kind}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def changed(array: np.ndarray, amount: float) -> np.ndarray:
    """The array with its entry of largest magnitude changed."""
    result = np.array(array)
    result.flat[np.argmax(np.abs(result))] += np.array(amount).astype(result.dtype)
    return result


def save(folder: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    """Writes ``<folder>/weight_search/<name>.npz``."""
    path = folder / "weight_search" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    return path


def assert_found(path: pathlib.Path, names: list[str]) -> None:
    """The check fails, and each array is named by a failed comparison."""
    with pytest.raises(GoldenMismatch) as caught:
        check(path)
    assert [name for name in names if not any(what.startswith(name) for what in caught.value.found)] == []


@pytest.mark.parametrize(("kind", "names", "amount"), CHANGES, ids=[f"{kind}:{names[0]}" for kind, names, _ in CHANGES])
def test_a_changed_array_is_found(tmp_path, kind: str, names: list[str], amount: float) -> None:
    arrays = arrays_of(kind)
    path = save(tmp_path, kind, {**arrays, **{name: changed(arrays[name], amount) for name in names}})
    assert_found(path, names)


def test_changed_arrays_of_a_network_are_found(tmp_path) -> None:
    arrays = arrays_of("net_resnet20_1b")
    each = ["grad_l2", "grad_absmax", "grad_head", "grad_dot", "weight_sum"]
    whole = ["logits_eval_fresh_bn", "logits_eval_matched_bn", "logits_train", "loss", "gx"]
    statistic = ["buf_after/layer2.0.bn1.running_var"]
    for name in each + whole + statistic:
        arrays[name] = changed(arrays[name], max(1.0, 0.1 * np.abs(arrays[name]).max()))
    arrays["grad_sum"] = changed(arrays["grad_sum"], 10 * np.abs(arrays["grad_l2"]).max() * 600)
    assert_found(save(tmp_path, "net_resnet20_1b", arrays), [*each, "grad_sum", *whole, *statistic])


def test_changed_arrays_of_a_run_are_found(tmp_path) -> None:
    kind = "train_hard_1b_cos_epoch"
    arrays = arrays_of(kind)
    names = ["step/loss", "step/lr", "step/temp", "step/alpha_conv3", "final/conv2.alpha", "final/bn3.running_mean"]
    names += [f"history/{split}_{what}" for split in ("train", "val") for what in ("loss", "acc1", "acc5")]
    for name in (*names, "init/conv2.qvals", "final/bn2.num_batches_tracked"):
        arrays[name] = changed(arrays[name], 1)
    assert_found(save(tmp_path, kind, arrays), [*names, "init/conv2.qvals", "final/bn2.num_batches_tracked"])


def test_one_other_choice_is_found(tmp_path) -> None:
    arrays = arrays_of("train_hard_1b_cos_epoch")
    arrays["step/index_conv2"][3, 0, 0, 0, 0] ^= 1
    assert_found(save(tmp_path, "train_hard_1b_cos_epoch", arrays), ["step/index: choices that differ"])


@pytest.mark.parametrize(
    ("count", "step", "found"),
    [
        (0, 0, []),
        (3, 5, []),
        (6, 5, ["step/index: choices that differ at first"]),
        (1, 1, ["step/index: agree before step 2"]),
    ],
)
def test_of_an_almost_tied_start_a_few_late_choices_may_differ(count, step, found) -> None:
    file = GoldenFile(DATA / "train_hard_1b_cos_epoch.npz")
    own = {f"index_{name}": list(file[f"step/index_{name}"].copy()) for name in training.SEARCHED}
    own["loss"] = [0.0] * 16
    own["index_conv2"][step].flat[:count] ^= 1
    result = Comparison()
    agreed = training._check_choices(file, result, own, near_ties=True)
    assert agreed == (step if count else 16)
    assert [row.what for row in result.rows if row.ratio > 1] == found


def made_curves() -> dict[str, np.ndarray]:
    """Curves with the published bests and last values, and nothing else of the published ones."""
    arrays = {"epoch": np.arange(1, 201), "seconds_per_epoch_resnet20_5runs": np.array([1, 1.27, 1.3, 1.3, 1.39])}
    for name, (best, at, last) in PUBLISHED.items():
        curve = np.full(200, last / 100)
        curve[0], curve[at - 1] = 0.5, best / 100
        arrays |= {f"{name}_val": curve, f"{name}_val_measured": np.arange(200) >= 7}
    arrays |= {"vggsmall_1b_train": np.ones(200), "vggsmall_1b_train_measured": np.arange(200) >= 51}
    return arrays


def findings(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of the failed comparisons of published curves."""
    result = Comparison()
    check_published_curves(GoldenFile(save(folder, "published_curves", arrays)), result)
    return [row.what for row in result.rows if row.ratio > 1]


def test_other_published_curves_are_found(tmp_path) -> None:
    arrays = made_curves()
    assert findings(tmp_path, arrays) == []
    other = np.array(arrays["resnet20_2b_val"])
    other[10] = 0.95
    assert findings(tmp_path, {**arrays, "resnet20_2b_val": other}) == ["resnet20_2b best", "resnet20_2b best epoch"]
    assert findings(tmp_path, {**arrays, "vggsmall_fp_val_measured": np.ones(200, bool)}) == [
        "vggsmall_fp few interpolated"
    ]
