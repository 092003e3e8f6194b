"""The SKD-BNN checks can fail: one changed number in a file of each kind is found."""

import collections
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnn_jax import networks
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.stages import spec
from bnn_jax.storage import pytorch
from tests.golden import golden_test
from tests.golden.asbq.support import normalised, to_pytorch
from tests.golden.comparison import Comparison, GoldenFile, GoldenMismatch
from tests.golden.skd_bnn import CHECKS, models
from tests.golden.skd_bnn.mlp import check_rates
from tests.golden.skd_bnn.models import evaluated
from tests.golden.skd_bnn.support import IRNET, SIGN, record_step
from tests.golden.skd_bnn.training import check_schedules
from tests.storage.torch_writer import to_pytorch_name

DATA = golden_test.COMMITTED / "skd_bnn"

# Kind of file, the part of it that is kept (for speed), the arrays to change, by how much: a few tolerances.
CHANGES = [
    ("binarize_and_schedules", "c0_", ["c0_y"], 1),
    ("binarize_and_schedules", "c0_", ["c0_dx"], 1e-4),
    ("binarize_and_schedules", "sched_._E128", ["sched_t_E128", "sched_k_E128"], 1e-2),
    ("binarize_and_schedules", "lr_E128_W0", ["lr_E128_W0_base0.001"], 1e-11),
    ("skd_conv", "c0_", [f"c0_{x}" for x in ("y", "realy", "bw", "sw")], 1e-4),
    ("skd_conv", "c0_", ["c0_dx", "c0_dw"], 0.1),
    ("losses", "(feat0|kl2|clus2)_", ["feat0_loss", "kl2_loss", "clus2_loss", "clus2_centers_gathered"], 1e-3),
    ("losses", "(feat0|kl2|clus2)_", ["feat0_dout", "kl2_dlogits", "clus2_dpenult"], 1e-4),
    ("losses", "feat_equal_", ["feat_equal_loss", "feat_equal_dout"], 1e-6),
    ("label_bank", "b0_|ep_", ["b0_sum_top1", "b0_sum_all", "b0_count_top1", "b0_count_all", "ep_count"], 1),
    ("label_bank", "ep_", ["ep_bank"], 1e-4),
    ("vgg_stage_pool_ties", "", ["conv_out", "real_conv_out", "stage_out", "pool_din"], 1),
    ("vgg_stage_pool_ties", "", ["dx", "dw", "dgamma", "dbeta"], 0.1),
    ("blocks", "r18_4x8s2/", [f"r18_4x8s2/train/{x}" for x in ("bin1", "real2", "featloss")], 1e-3),
    ("blocks", "r18_4x8s2/", [f"r18_4x8s2/eval/{x}" for x in ("bin2", "real1", "featloss")], 1e-3),
    (
        "blocks",
        "r18_4x8s2/",
        ["r18_4x8s2/k"]
        + [f"r18_4x8s2/train/{x}" for x in ("dx", "grad/shortcut.0.weight", "buffer_after/bn1.running_var")],
        0.1,
    ),
]


def check(path: pathlib.Path) -> None:
    golden_test.check_file(path, lambda name, line: None)


def arrays_of(kind: str, part: str) -> dict[str, np.ndarray]:
    """Arrays whose names begin with ``part``, with the lists of cases cut to what is left."""
    with np.load(DATA / f"{kind}.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if re.match(part, name)}
        if "n_cases" in archive.files:
            arrays["n_cases"] = np.array(len({name.partition("_")[0] for name in arrays if re.match(r"c\d+_", name)}))
        if "names" in archive.files:
            arrays["names"] = np.array([name for name in archive["names"] if re.match(part, f"{name}/")])
    return arrays


def changed(array: np.ndarray, amount: float) -> np.ndarray:
    """The array with its entry of largest magnitude changed; NaN counts as small."""
    result = np.array(array)
    result.flat[np.argmax(np.nan_to_num(np.abs(result)))] += np.array(amount).astype(result.dtype)
    return result


def save(folder: pathlib.Path, name: str, arrays: dict[str, Any]) -> pathlib.Path:
    """Writes ``<folder>/skd_bnn/<name>.npz``."""
    path = folder / "skd_bnn" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    return path


def assert_found(path: pathlib.Path, names: list[str]) -> tuple[str, ...]:
    """The check fails, and each array is named by a failed comparison; returns the names of all that failed."""
    with pytest.raises(GoldenMismatch) as caught:
        check(path)
    assert [name for name in names if not any(what.startswith(name) for what in caught.value.found)] == []
    return caught.value.found


@pytest.mark.parametrize(
    ("kind", "part", "names", "amount"), CHANGES, ids=[f"{kind}:{names[0]}" for kind, _, names, _ in CHANGES]
)
def test_a_changed_array_is_found(tmp_path, kind: str, part: str, names: list[str], amount: float) -> None:
    arrays = arrays_of(kind, part)
    assert_found(save(tmp_path, kind, {**arrays, **{name: changed(arrays[name], amount) for name in names}}), names)


def test_a_bank_row_that_should_be_nan_is_found(tmp_path) -> None:
    arrays = arrays_of("label_bank", "ep_")
    arrays["ep_bank"] = np.nan_to_num(arrays["ep_bank"])
    assert_found(save(tmp_path, "label_bank", arrays), ["ep_bank"])


def test_margins_are_not_compared(tmp_path) -> None:
    arrays = {**arrays_of("vgg_stage_pool_ties", ""), "min_abs_activation_before_sign": np.array(1e-6)}
    check(save(tmp_path, "vgg_stage_pool_ties", arrays))


def test_an_array_nobody_reads_is_found(tmp_path) -> None:
    arrays = {**arrays_of("vgg_stage_pool_ties", ""), "surprise": np.zeros(3)}
    with pytest.raises(GoldenMismatch, match="no check has read: surprise"):
        check(save(tmp_path, "vgg_stage_pool_ties", arrays))


def test_released_label_banks_with_another_largest_entry_are_found(tmp_path) -> None:
    bank = np.eye(4, dtype=np.float32)
    check(save(tmp_path, "released_label_banks", {"A_epoch100": bank}))
    bank[2, 3] = 2
    assert_found(save(tmp_path, "released_label_banks", {"A_epoch100": bank}), ["A_epoch100, largest"])


# Kinds whose files hold released weights or images: made here with the library itself, of the smallest networks, only
# to show that their checks run and find a change. What the library has to fill in is NaN.
UNKNOWN = np.array(np.nan)
CLASSES = 3


def unknown_like(state: dict[str, np.ndarray], prefix: str, pattern: str = "") -> dict[str, np.ndarray]:
    """NaN in the shapes of those arrays of a state whose names begin with ``pattern``."""
    return {prefix + name: np.full_like(array, np.nan) for name, array in state.items() if re.match(pattern, name)}


class Recorder(Comparison):
    """Keeps our values by name instead of comparing them; those of 'NAME of X' as a list under NAME."""

    def __init__(self):
        super().__init__()
        self.lists: dict[str, list[float]] = collections.defaultdict(list)
        self.values: dict[str, np.ndarray] = {}

    def close(self, what: str, own, reference, **_) -> None:
        name, of, _ = what.partition(" of ")
        if of:
            self.lists[name].append(float(own))
        else:
            self.values[what] = np.asarray(own)


def completed(folder: pathlib.Path, name: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a made file, with the library's values in place of NaN."""
    run = next(check for pattern, check in CHECKS if re.fullmatch(pattern, name))
    recorder = Recorder()
    run(GoldenFile(save(folder, name, arrays)), recorder)
    values = {**recorder.values, **{key: np.array(values) for key, values in recorder.lists.items()}}
    unknown = {key for key, array in arrays.items() if array.dtype.kind == "f" and np.isnan(array).all()}
    return {key: values.get(key, array) if key in unknown else array for key, array in arrays.items()}


def assert_changes_are_found(
    folder: pathlib.Path, name: str, arrays: dict[str, Any], amounts: dict[str, float]
) -> None:
    """The arrays of ``amounts``, changed by that much, are found, and nothing else is: the rest passes."""
    other = {key: changed(arrays[key], amount) for key, amount in amounts.items()}
    found = assert_found(save(folder, name, {**arrays, **other}), list(amounts))
    assert [what for what in found if not what.startswith(tuple(amounts))] == []


def made_state(
    network: Any, image_shape: tuple[int, int, int], *, seed: int, prefix: str = ""
) -> dict[str, np.ndarray]:
    """A random state by PyTorch's names."""
    random, state = np.random.RandomState(seed), {}
    shapes = {name: tree for name, tree in variable_shapes(network, image_shape).items() if tree and name != "knobs"}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        name = to_pytorch_name(path)
        value = random.normal(0, 0.2, leaf.shape).astype(np.float32)
        state[prefix + name] = np.abs(value) + 1 if name.endswith("var") else to_pytorch(value)
        if name.startswith("fc") and name.endswith("bias") and len(value) == CLASSES:
            # Class 0 is predicted, so that it has a row in the label bank.
            state[prefix + name] += np.float32([3, 0, 0])
    return state


def tiny_resnet() -> Any:
    """One block."""
    return networks.build(spec("hardtanh_resnet20", stage_sizes=(1,), widths=(4,)), IRNET, num_classes=CLASSES)


def made_images(folder: pathlib.Path, count: int) -> np.ndarray:
    """Random images, saved as a file of images whose logits come from two random states."""
    images = np.random.RandomState(5).randint(0, 256, (count, 12, 12, 3)).astype(np.uint8)
    arrays: dict[str, Any] = {"images_u8_nhwc": images, "test_index": np.arange(count), "labels": np.zeros(count, int)}
    for name, suffix, seed in (("best", "", 1), ("epoch600", "_epoch600_state", 2)):
        network, prefix = tiny_resnet(), "module."
        state = made_state(network, (12, 12, 3), seed=seed, prefix=prefix)
        save(folder, f"resnet20_{name}_state", state)
        plain = {key.removeprefix(prefix): array for key, array in state.items()}
        variables = pytorch.import_state(plain, variable_shapes(network, (12, 12, 3)))
        output = evaluated(network, variables, normalised(images))
        arrays |= {f"logits{suffix}": np.array(output.logits), f"penultimate{suffix}": np.array(output.features)}
    save(folder, "resnet20_best_images_logits", arrays)
    return arrays


def test_images_logits_of_every_state_are_compared(tmp_path) -> None:
    arrays = made_images(tmp_path, 40)
    check(tmp_path / "skd_bnn" / "resnet20_best_images_logits.npz")
    shift = np.where(np.arange(40) < 3, 0.01, 0)[:, None]
    for name in ("logits", "penultimate", "logits_epoch600_state", "penultimate_epoch600_state"):
        path = save(tmp_path, "resnet20_best_images_logits", {**arrays, name: arrays[name] + shift})
        assert_found(path, [f"{name}, share of images beyond"])


def test_a_state_loads_strictly(tmp_path) -> None:
    network = networks.build(spec("hardtanh_resnet20"), IRNET, num_classes=10)
    state = made_state(network, (32, 32, 3), seed=0, prefix="module.")
    check(save(tmp_path, "resnet20_epoch600_state", {**state, "module.bn1.num_batches_tracked": np.array(7)}))
    without = {name: array for name, array in state.items() if name != "module.bn2.weight"}
    for other in (without, {**state, "module.surprise.weight": np.zeros(3, np.float32)}):
        with pytest.raises(ValueError, match="another network"):
            check(save(tmp_path, "resnet20_epoch600_state", other))


def test_a_state_of_another_network_is_found(tmp_path) -> None:
    state = made_state(tiny_resnet(), (12, 12, 3), seed=0)
    assert_found(save(tmp_path, "resnet20_best_state", state), ["shapes of the published network"])


def test_train_step_vectors_pass_and_changes_are_found(tmp_path) -> None:
    made_images(tmp_path, 6)
    state = made_state(tiny_resnet(), (12, 12, 3), seed=2)
    scalars = ["loss_ce", "loss_feature", "loss_label", "loss_cluster", "loss_total"]
    scalars += [f"gradnorm_{term}" for term in ("ce", "feature", "label", "cluster")]
    pairs = [
        f"{x}_2" for x in ("feature_losses", "sign_agreement", "mean_bin", "mean_real", "absmean_bin", "absmean_real")
    ]
    arrays = {
        **dict.fromkeys([*scalars, *pairs, "logits", "penultimate", "L1_1_bin_img0", "L1_2_real_img0to3"], UNKNOWN),
        "idx_into_256": np.array([4, 1, 3, 0, 5]),
        "labels": np.array([0, 1, 2, 0, 1]),
        "state": np.array("600"),
        "k": np.ones(1, np.float32),
        "t": np.float32([10 ** (-3 + 4 * 600 / 700)]),
        "epoch_of_700": np.array(600),
        "bank": np.random.RandomState(0).normal(size=(CLASSES, CLASSES)).astype(np.float32),
        **unknown_like(state, "grad/", "(?!.*running)"),
        **unknown_like(state, "buffer_after/", "bn1.running_var"),
        "min_abs_activation_before_sign": np.array(1e-6),
    }
    arrays = completed(tmp_path, "resnet20_train_step_vectors", arrays)
    amounts = dict.fromkeys([*scalars, *pairs, "logits", "penultimate"], 1e-2)
    amounts |= {"L1_1_bin_img0": 1e-2, "L1_2_real_img0to3": 1e-2, "buffer_after/bn1.running_var": 0.1}
    amounts |= {name: 1.0 for name in arrays if name.startswith("grad/")}
    assert_changes_are_found(tmp_path, "resnet20_train_step_vectors", arrays, amounts)


def test_trajectory_passes_and_changes_are_found(tmp_path) -> None:
    made_images(tmp_path, 8)
    state = made_state(tiny_resnet(), (12, 12, 3), seed=1)
    arrays = {
        "idx_into_256": np.arange(8)[::-1],
        "labels": np.zeros(8, int),
        "crop": np.array([2, 10, 1, 9]),
        "init_state": np.array("best"),
        "batch": np.array(4),
        "epochs_E": np.array(4),
        "warmup_W": np.array(1),
        "base_lr": np.array(0.01),
        "n_epochs_run": np.array(2),
        "momentum": np.array(0.9),
        "weight_decay": np.array(1e-4),
        "k": np.array([1000, 100], np.float32),
        "t": np.array([1e-3, 1e-2], np.float32),
        "lr": np.array([0.005, 0.01]),
        "steps_total_feature_label_cluster_top1": np.full((2, 2, 5), np.nan),
        "banks": np.full((2, CLASSES, CLASSES), np.nan),
        **dict.fromkeys(["fc_weight_per_epoch", "bn1_running_var_per_epoch"], UNKNOWN),
        **unknown_like(state, "final/"),
    }
    arrays = completed(tmp_path, "resnet20_trajectory", arrays)
    assert np.isfinite(arrays["steps_total_feature_label_cluster_top1"]).all()
    assert (arrays["steps_total_feature_label_cluster_top1"][1, :, 2] > 0).all()
    names = ["steps_total_feature_label_cluster_top1", "banks", "fc_weight_per_epoch"]
    amounts = dict.fromkeys([*names, "bn1_running_var_per_epoch", *(f"final/{name}" for name in state)], 1e-2)
    assert_changes_are_found(tmp_path, "resnet20_trajectory", arrays, amounts)


def test_schedules_of_a_trajectory_are_compared(tmp_path) -> None:
    arrays = {"base_lr": 0.01, "warmup_W": 1, "epochs_E": 4, "lr": [0.005, 0.01], "k": [1000, 100], "t": [1e-3, 1e-2]}
    file, result = GoldenFile(save(tmp_path, "resnet20_trajectory", arrays)), Comparison()
    check_schedules(file, result, 2)
    assert [row.ratio <= 1 for row in result.rows] == [True] * 3
    file, result = (
        GoldenFile(save(tmp_path, "any", {**arrays, "lr": [0.005, 0.02], "k": [1, 2], "t": [1, 2]})),
        Comparison(),
    )
    check_schedules(file, result, 2)
    assert [row.ratio <= 1 for row in result.rows] == [False] * 3


def test_rates_of_the_mlp_are_compared() -> None:
    result = Comparison()
    check_rates(result, np.array([0.01, 0.008537]))
    check_rates(result, np.array([0.01, 0.0086]))
    assert [row.ratio <= 1 for row in result.rows] == [True, False]


def test_mnist_mlp_passes_and_changes_are_found(tmp_path) -> None:
    random, hidden, batch = np.random.RandomState(0), 5, 6
    network = networks.build(spec("hardtanh_mlp", hidden=hidden), SIGN, num_classes=CLASSES)
    state = made_state(network, (4, 4, 1), seed=3)
    outputs = [
        "logsoftmax",
        "penult_logits",
        "eval_logsoftmax",
        *(f"{x}{i}" for x in ("bin", "real") for i in (1, 2, 3)),
    ]
    losses = ["feature_losses", "losses_ce_feature_label_cluster_total", "traj_total_loss", "traj_label_loss"]
    arrays = {
        "x": random.uniform(size=(3, batch, 1, 4, 4)).astype(np.float32),
        "y": random.randint(0, CLASSES, (3, batch)),
        "hidden": np.array(hidden),
        "bank": random.normal(size=(CLASSES, CLASSES)).astype(np.float32),
        "traj_lr": np.array([0.01, 0.008537]),
        "traj_banks": np.full((2, CLASSES, CLASSES), np.nan),
        **dict.fromkeys([*outputs, *losses], UNKNOWN),
        "feature_losses": np.full(3, np.nan),
        **{f"init/{name}": array for name, array in state.items()},
        **unknown_like(state, "final/"),
        **unknown_like(state, "grad/", "(?!.*running)"),
    }
    arrays = completed(tmp_path, "mnist_mlp_small", arrays)
    amounts = dict.fromkeys([*outputs, *losses, "traj_banks"], 1e-2)
    amounts |= {name: 0.1 for name in arrays if re.match("grad/|final/(?!fc[123].bias|.*running_mean)", name)}
    assert_changes_are_found(tmp_path, "mnist_mlp_small", arrays, amounts)


@pytest.fixture
def one_step(monkeypatch) -> list[str]:
    """Runs the network's step once, in float32, and takes it for the float64 one; lists what was asked for."""
    asked, known = [], []

    def record(*arguments, **options):
        dtype = str(options["bank"].dtype)
        asked.append(dtype)
        if not known:
            known.append(record_step(*arguments, **options))
        step = known[0]
        return step.replace(outputs=jax.tree.map(lambda x: jnp.asarray(x, dtype), step.outputs))

    monkeypatch.setattr(models, "record_step", record)
    return asked


def test_changes_of_a_fullsize_network_are_found_in_both_precisions(tmp_path, one_step) -> None:
    arrays = arrays_of("fullsize_VGG_Small", "")
    names = ["logits", "penultimate", "losses_ce_feature_label_cluster_total", "feature_losses", "feature_stats"]
    amounts = dict.fromkeys([*names, "buffer_norms_after"], 10.0)
    amounts |= {"grad_norms": 1e4, "grad_projections": 1e4}
    assert_changes_are_found(tmp_path, "fullsize_VGG_Small", arrays, amounts)
    assert one_step == ["float32", "float64"]
