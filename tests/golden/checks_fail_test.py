"""The golden checks can fail: one changed number in a file of each kind is found."""

import pathlib
import re
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnn_jax import networks
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import spec
from bnn_jax.storage import pytorch
from tests.golden import golden_test
from tests.golden.asbq.support import full_masks, normalised, quant_spec, to_pytorch
from tests.golden.asbq.trajectory import check_trajectory
from tests.golden.comparison import Comparison, GoldenFile, GoldenMismatch
from tests.storage.torch_writer import to_pytorch_name

DATA = golden_test.COMMITTED / "asbq"

# Kind of file, the part of it that is kept (for speed), the arrays to change, by how much: a few tolerances. Arrays of
# one row are changed together, since their comparisons do not depend on each other.
CHANGES = [
    ("weight_quantizer", "c0/", ["c0/q1", "c0/q4", "c0/q32"], 1e-5),
    ("weight_quantizer", "c0/", ["c0/g1", "c0/g8"], 3e-6),
    ("activation_quantizer", "", ["q1", "q8", "g2", "g32"], 4e-6),
    ("conv_q", "l2_", ["l2_w4_k3s1/y", "l2_w4_k3s1/gx", "l2_w4_k3s1/gw", "l2_w4_k3s1/wq"], 1e-4),
    ("conv_q", "l2_", ["l2_w4_k3s1/mask"], -1),
    ("masks", "[fb]0/", ["f0/keep", "b0/mask"], -1),
    (
        "loss",
        "student|teacher|labels|T5_lam0.3_mean/",
        [f"T5_lam0.3_mean/{x}" for x in ("ce", "kd", "loss", "grad")],
        1e-4,
    ),
    (
        "blocks",
        "b14_",
        [f"b14_checkpoint_k1_8to16s2_train/{x}" for x in ("y", "gx", "grad/bn1.weight", "out/bn2.running_var")],
        5e-2,
    ),
    ("model_resnet20_cifar", "(?!k4)", ["checksum_param", "k1/logits", "k1/train_logits", "k1/grad_l2"], 1.0),
    ("model_resnet20_cifar", "(?!k4)", ["keep/layer2.0.conv1"], -1),
]


def check(path: pathlib.Path) -> None:
    golden_test.check_file(path, lambda name, line: None)


def arrays_of(kind: str, part: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{kind}.npz") as archive:
        return {name: archive[name] for name in archive.files if re.match(part, name)}


def changed(array: np.ndarray, amount: float) -> np.ndarray:
    """The array with its entry of largest magnitude changed; in a mask, a kept one becomes dropped."""
    result = array.copy()
    result.flat[np.argmax(np.abs(result))] += np.array(amount).astype(result.dtype)
    return result


def save(folder: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    """Writes ``<folder>/asbq/<name>.npz``."""
    path = folder / "asbq" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("kind", "part", "names", "amount"), CHANGES, ids=[f"{kind}:{names[0]}" for kind, _, names, _ in CHANGES]
)
def test_a_changed_array_is_found(tmp_path, kind: str, part: str, names: list[str], amount: float) -> None:
    arrays = arrays_of(kind, part)
    path = save(tmp_path, kind, {**arrays, **{name: changed(arrays[name], amount) for name in names}})
    with pytest.raises(GoldenMismatch) as caught:
        check(path)
    assert [name for name in names if not name_found(name, caught.value.found)] == []


def name_found(name: str, found: tuple[str, ...]) -> bool:
    """Whether one of the failed comparisons is about the array."""
    return any(what.startswith(name.removeprefix("keep/")) for what in found)


def test_the_unchanged_part_passes(tmp_path) -> None:
    check(save(tmp_path, "weight_quantizer", arrays_of("weight_quantizer", "c0/")))


def test_not_a_number_is_found(tmp_path) -> None:
    arrays = arrays_of("weight_quantizer", "c0/")
    arrays["c0/g4"][0, 0, 0, 0] = np.nan
    with pytest.raises(GoldenMismatch, match="c0/g4"):
        check(save(tmp_path, "weight_quantizer", arrays))


def test_an_array_of_another_shape_is_found(tmp_path) -> None:
    arrays = arrays_of("weight_quantizer", "c0/")
    arrays["c0/q2"] = arrays["c0/q2"][:1]
    with pytest.raises((GoldenMismatch, IndexError), match="c0/q2"):
        check(save(tmp_path, "weight_quantizer", arrays))


def test_an_array_nobody_reads_is_found(tmp_path) -> None:
    arrays = arrays_of("weight_quantizer", "c0/")
    with pytest.raises(GoldenMismatch, match="no check has read: c0/surprise"):
        check(save(tmp_path, "weight_quantizer", {**arrays, "c0/surprise": np.zeros(3)}))


def test_a_file_without_a_case_fails(tmp_path) -> None:
    with pytest.raises(GoldenMismatch, match="nothing was compared"):
        check(save(tmp_path, "masks", {}))


def test_a_file_of_a_built_method_without_a_check_fails(tmp_path) -> None:
    with pytest.raises(AssertionError, match=r"asbq/unheard_of: .* no check is registered"):
        check(save(tmp_path, "unheard_of", {"x": np.zeros(1)}))


def test_a_folder_of_an_unknown_method_fails(tmp_path) -> None:
    path = tmp_path / "unheard_of" / "masks.npz"
    path.parent.mkdir()
    np.savez(path, x=np.zeros(1))
    with pytest.raises(AssertionError, match="'unheard_of' is in no table"):
        check(path)


# Kinds whose files hold released weights or photographs, or lie in no public folder: made here with the library itself,
# only to show that their checks run and find a change.
WIDTHS = (16, 32)
CLASSES = 3


def made_network(widths: tuple[int, ...]) -> Any:
    """One `checkpoint` block per stage."""
    choice = spec("resnet8", block="checkpoint", stage_sizes=(1,) * len(widths), widths=widths)
    return networks.build(choice, quant_spec(4), num_classes=CLASSES)


def made_state(seed: int, widths: tuple[int, ...] = WIDTHS) -> dict[str, np.ndarray]:
    """A random state of a small network by PyTorch's names, with masks."""
    random, network = np.random.RandomState(seed), made_network(widths)
    flat = flatten_dict(variable_shapes(network, (32, 32, 3)), sep="/")
    masked = {path.removeprefix("quant_state/").removesuffix("/weight_quantizer/mask") for path in flat}
    state = {}
    for path, leaf in flat.items():
        if path.startswith("quant_state/"):
            continue
        layer = path.removeprefix("params/").removesuffix("/kernel")
        name = to_pytorch_name(path, pruned=layer in masked)
        value = random.normal(0, 0.2, leaf.shape).astype(np.float32)
        state[name] = np.abs(value) + 1 if name.endswith("var") else to_pytorch(value)
    keep = {}
    for name in [name for name in state if name.endswith("weight_orig")]:
        keep[name.removesuffix(".weight_orig")] = np.ones(len(state[name]), np.uint8)
        keep[name.removesuffix(".weight_orig")][: round(0.05 * len(state[name]))] = 0
    return {**state, **full_masks(keep, state), "bn.num_batches_tracked": np.array(7)}


def logits_of(state: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    network = made_network(WIDTHS)
    variables = pytorch.import_state(state, variable_shapes(network, (32, 32, 3)))
    return np.asarray(network.apply(variables, normalised(images), QuantContext()).logits)


def test_checkpoint_state_loads_and_a_missing_extra_or_reshaped_array_is_found(tmp_path) -> None:
    state = made_state(0)
    check(save(tmp_path, "checkpoint_state", state))
    without = {name: array for name, array in state.items() if name != "layer2.0.bn1.weight"}
    for other in (without, {**state, "surprise.weight": np.zeros(3)}, {**state, "bn.bias": np.zeros(5, np.float32)}):
        with pytest.raises(ValueError, match="another network"):
            check(save(tmp_path, "checkpoint_state", other))


@pytest.mark.parametrize(
    ("rows", "what"), [(slice(0, 1), "masked filters"), ((slice(None), slice(0, 1)), "constant per filter")]
)
def test_checkpoint_state_with_other_masks_is_found(tmp_path, rows, what: str) -> None:
    state = made_state(0)
    name = "layer2.0.conv1.weight_mask"
    state[name] = np.array(state[name])
    state[name][rows] = 1 - state[name][rows]
    with pytest.raises(GoldenMismatch, match=what):
        check(save(tmp_path, "checkpoint_state", state))


def test_checkpoint_eval_passes_and_changed_logits_or_labels_are_found(tmp_path) -> None:
    state, random = made_state(1), np.random.RandomState(2)
    images = random.randint(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    logits = logits_of(state, images)
    save(tmp_path, "checkpoint_state", state)
    arrays = {"images": images, "labels": logits.argmax(-1), "logits": logits, "logits_f64": logits.astype(float)}
    clean = {f"clean_{name}": array for name, array in arrays.items()}
    arrays = {**arrays, **clean, "files": np.array(["a"] * 12), "clean_index": np.arange(12)}
    check(save(tmp_path, "checkpoint_eval", arrays))
    shift = np.where(np.arange(12) < 3, 0.01, 0)[:, None]
    with pytest.raises(GoldenMismatch, match="clean_logits, share of images beyond 2e-3"):
        check(save(tmp_path, "checkpoint_eval", {**arrays, "clean_logits": clean["clean_logits"] + shift}))
    with pytest.raises(GoldenMismatch, match="logits_f64, largest difference"):
        check(save(tmp_path, "checkpoint_eval", {**arrays, "logits_f64": logits + 1.1 * (np.arange(12) == 5)[:, None]}))


class Recorder(Comparison):
    """Keeps our values by name instead of comparing them."""

    def __init__(self):
        super().__init__()
        self.values: dict[str, np.ndarray] = {}

    def close(self, what: str, own, reference, **_) -> None:
        self.values[what] = np.asarray(own)


def made_trajectory(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """A chain of two rungs, two steps each, with the values the library computes."""
    random, state = np.random.RandomState(3), made_state(4, widths=(16,))
    masks = {name: array for name, array in state.items() if name.endswith("weight_mask")}
    initial = {name: array for name, array in state.items() if name not in masks and "num_batches" not in name}
    for name in initial:
        if "running" in name:
            initial[name] = np.full_like(initial[name], float(name.endswith("var")))
    arrays = {f"init/{name}": array for name, array in initial.items()}
    arrays["images"] = random.randint(0, 256, (2, 6, 32, 32, 3)).astype(np.uint8)
    arrays["labels"] = random.randint(0, CLASSES, (2, 6))
    for bits in (32, 4):
        for name, mask in masks.items():
            arrays[f"b{bits}/keep/{name.removesuffix('.weight_mask')}"] = mask[:, 0, 0, 0]
        for name in ("loss", "ce", "kd", "loss_f64"):
            arrays[f"b{bits}/lam0.5/{name}"] = np.zeros(2)
        for name in ("fc.weight", "layer1.0.conv1.weight_orig", "layer1.0.bn1.weight", "bn.running_var"):
            arrays[f"b{bits}/lam0.5/step2/{name}"] = initial[name]
    recorder = Recorder()
    check_trajectory(GoldenFile(save(folder, "trajectory_checkpoint", arrays)), recorder)
    return {**arrays, **recorder.values}


def test_trajectory_checkpoint_passes_and_changed_arrays_are_found(tmp_path) -> None:
    arrays = made_trajectory(tmp_path)
    assert arrays["b32/lam0.5/kd"].size == 0
    # Its bn1 gets no gradient (identity block): neither does weight decay move it.
    np.testing.assert_array_equal(arrays["b4/lam0.5/step2/layer1.0.bn1.weight"], arrays["init/layer1.0.bn1.weight"])
    check(save(tmp_path, "trajectory_checkpoint", arrays))
    names = ["b32/lam0.5/ce", "b4/lam0.5/loss", "b4/lam0.5/kd", "b4/lam0.5/step2/layer1.0.conv1.weight_orig"]
    path = save(tmp_path, "trajectory_checkpoint", {**arrays, **{name: changed(arrays[name], 0.3) for name in names}})
    with pytest.raises(GoldenMismatch) as caught:
        check(path)
    assert [name for name in names if not name_found(name, caught.value.found)] == []
