"""Checks of whole networks: generated parameters at full width, and the released states."""

import ast
import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import networks
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.networks.base import NetworkOutput
from bnn_jax.objectives.self_distill import channel_and_spatial_distance
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import spec
from bnn_jax.storage import pytorch
from tests.conftest import ROOT
from tests.golden.asbq.support import in_pytorch_form, nhwc, normalised
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.skd_bnn.support import (
    IRNET,
    RecordedStep,
    compare_estimator,
    held,
    loss_terms,
    pair_losses,
    record_step,
    relative_to_largest,
    resnet,
    state_by_name,
    weighted,
)

NETWORK_OF = {
    "ResNet20": "hardtanh_resnet20",
    "ResNet18": "hardtanh_resnet18_cifar",
    "ImageNet": "hardtanh_resnet18",
    "VGG_Small": "hardtanh_vgg_small",
}
LOSSES = "losses_ce_feature_label_cluster_total"


def generated(seed: int, *path: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers as the files define them, in float64."""
    return np.random.default_rng([seed, *path]).standard_normal(shape)


def generated_state(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state of these names and shapes, in the file's order, as the files' README defines it."""
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        leaf = name.rpartition(".")[2]
        if leaf in ("running_mean", "running_var", "num_batches_tracked"):
            state[name] = np.full(shape, float(leaf == "running_var"), np.float32)
            continue
        r = generated(seed, i, shape=shape)
        if len(shape) > 1:
            r = r * np.sqrt(2 / np.prod(shape[1:]))
        else:
            r = 1 + 0.2 * r if leaf == "weight" else 0.1 * r
        state[name] = r.astype(np.float32)
    return state


def _network(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The network a ``fullsize_<kind>`` file is about, with the widths of its state."""
    name = NETWORK_OF[kind]
    if kind != "VGG_Small":
        return resnet(shapes, name)
    widths = tuple(shape[0] for key, shape in shapes.items() if re.fullmatch(r"conv\d+\.weight", key))
    return networks.build(spec(name, widths=widths), IRNET, num_classes=shapes["fc.bias"][0])


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a ``fullsize`` file stands for.

    Attributes:
      seed: the file's seed.
      shapes: of the state, by PyTorch's names, in the file's order.
      network: Linen module.
      variables: the network's, float32.
      images: (N, C, H, W), float32.
      bank: (K, K), float32.
    """

    seed: int
    shapes: Mapping[str, tuple[int, ...]]
    network: Any
    variables: Mapping[str, Any]
    images: np.ndarray
    bank: np.ndarray


def check_fullsize(file: GoldenFile, result: Comparison) -> None:
    """A training step of a published network: outputs, losses, every gradient, running statistics.

    In float32 an activation or a real convolution's output within 1e-6 of 0 may have the other sign than in the
    original; the float64 run is free of that, so a step that does not agree is repeated in float64.
    """
    kind, seed = file.path.stem.removeprefix("fullsize_"), int(file["seed"])
    shapes = {str(n): ast.literal_eval(str(s)) for n, s in zip(file["state_names"], file["state_shapes"], strict=True)}
    network = _network(kind, shapes)
    images = generated(seed, 1000000, shape=tuple(file["input_shape"])).astype(np.float32)
    image_shape = (*images.shape[2:], images.shape[1])
    case = Generated(
        seed=seed,
        shapes=shapes,
        network=network,
        variables=pytorch.import_state(generated_state(seed, shapes), variable_shapes(network, image_shape)),
        images=images,
        bank=(2 * generated(seed, 1000002, shape=(network.num_classes,) * 2)).astype(np.float32),
    )
    compare_estimator(result, "", file, epoch=int(file["epoch"]), epochs=int(file["E"]))
    single = Comparison()
    _check_generated_step(file, single, case)
    if single.worst.ratio <= 1:
        result.rows += single.rows
        return
    result.notes.append(f"in float64, since in float32 {single.worst}")
    with jax.enable_x64(True):
        _check_generated_step(file, result, case, dtype=np.float64)


def _check_generated_step(
    file: GoldenFile, result: Comparison, case: Generated, *, dtype: type[np.floating] = np.float32
) -> None:
    """Runs the step in one precision and compares everything."""
    step = record_step(
        case.network,
        jax.tree.map(lambda leaf: leaf.astype(dtype), dict(case.variables)),
        nhwc(case.images.astype(dtype)),
        file["labels"],
        terms=loss_terms(),
        bank=case.bank.astype(dtype),
        knobs={f"error_decay_{name}": held(file[name]) for name in ("k", "t")},
    )
    result.require(f"computed in {dtype.__name__}", step.outputs.logits.dtype == dtype)
    _check_outputs(file, result, step)
    _check_projections(file, result, step, case)
    _check_statistics(file, result, step, case.shapes)


def _check_outputs(file: GoldenFile, result: Comparison, step: RecordedStep) -> None:
    """Logits, features, losses, and five numbers about each pair of feature maps."""
    outputs = step.outputs
    result.close("logits", outputs.logits, file["logits"], atol=1e-4)
    # Of the long features of VGG-Small every 16th is stored.
    stride = outputs.features.shape[1] // file["penultimate"].shape[1]
    result.close("penultimate", outputs.features[:, ::stride], file["penultimate"], atol=1e-4)
    shapes = [ast.literal_eval(str(shape)) for shape in file["feature_shapes"]]
    own_shapes = [(f.shape[0], f.shape[3], f.shape[1], f.shape[2]) for f in outputs.block_features]
    result.require("feature_shapes", shapes == own_shapes)
    distances = pair_losses(outputs, channel_and_spatial_distance)
    result.close("feature_losses", distances, file["feature_losses"], atol=1e-4)
    result.close("feature_stats", feature_statistics(step), file["feature_stats"], atol=1e-4)
    own = jnp.stack(list(weighted(step.metrics, loss_terms()).values()))
    result.close(LOSSES, own, file[LOSSES], atol=1e-4)


def feature_statistics(step: RecordedStep) -> np.ndarray:
    """Per pair: mean and mean magnitude of the binary map, the same of the real one, share of equal signs."""
    rows = []
    for pair in zip(step.outputs.block_features, step.outputs.real_features, strict=True):
        binary, real = (np.asarray(feature, np.float64) for feature in pair)
        agreement = np.mean(np.sign(binary) == np.sign(real))
        rows.append([binary.mean(), np.abs(binary).mean(), real.mean(), np.abs(real).mean(), agreement])
    return np.array(rows)


def _check_projections(file: GoldenFile, result: Comparison, step: RecordedStep, case: Generated) -> None:
    """Norm of every parameter's gradient, and its product with a generated direction."""
    names = [str(name) for name in file["param_names"]]
    gradients = in_pytorch_form({"params": step.gradients}, {name: np.empty(case.shapes[name]) for name in names})
    result.exact("parameters", sorted(gradients), sorted(names))
    for j, name in enumerate(names):
        norm, gradient = float(file["grad_norms"][j]), np.asarray(gradients[name], np.float64)
        result.close(f"grad_norms of {name}", np.linalg.norm(gradient), norm, rtol=1e-3)
        product = np.sum(gradient * generated(case.seed, 2000000 + j, shape=case.shapes[name]))
        result.close(f"grad_projections of {name}", product, file["grad_projections"][j], atol=1e-3 * norm)


def _check_statistics(
    file: GoldenFile, result: Comparison, step: RecordedStep, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Running statistics after the step: norms of all, values of some."""
    names = [str(name) for name in file["buffer_names"]]
    own = in_pytorch_form(step.state.variables, {name: np.empty(shapes[name]) for name in names})
    for name, norm in zip(names, file["buffer_norms_after"], strict=True):
        result.close(f"buffer_norms_after of {name}", np.linalg.norm(own[name]), norm, rtol=1e-4)
    for name, array in file.group("buffer_after/").items():
        relative_to_largest(result, f"buffer_after/{name}", own[name], array, rtol=1e-4)


def find_file(beside: pathlib.Path, names: list[str]) -> GoldenFile:
    """The first of these files that lies beside a file, or else where the full set lies beside the checkout.

    Raises:
      FileNotFoundError: neither folder has one.
    """
    for folder in (beside.parent, ROOT.parent / "shared" / "golden" / beside.parent.name):
        for name in names:
            if (folder / name).exists():
                return GoldenFile(folder / name)
    raise FileNotFoundError(f"{beside.name} needs one of {', '.join(names)} beside it")


def load_state(beside: pathlib.Path, name: str) -> tuple[Any, dict[str, Any]]:
    """Network and variables of the ResNet-20 state a file names: 'best', '600', 'epoch600', 'epoch600_state'."""
    stem = name.removesuffix("_state")
    file = find_file(beside, [f"resnet20_{stem}_state.npz", f"resnet20_epoch{stem}_state.npz"])
    return load_arrays(state_by_name(file.group("")))


def load_arrays(state: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
    """ResNet-20 of the widths and depth of a state, and its variables; strict.

    Raises:
      CheckpointError: an array is missing, left over or of another shape.
    """
    network = resnet({name: array.shape for name, array in state.items()}, "hardtanh_resnet20")
    return network, pytorch.import_state(state, variable_shapes(network, (32, 32, 3)))


def check_state(file: GoldenFile, result: Comparison) -> None:
    """A released state loads strictly, every number of it, into the ResNet-20 of the table."""
    state = state_by_name(file.group(""))
    _, variables = load_arrays(state)
    published = networks.build(spec("hardtanh_resnet20"), IRNET, num_classes=10)
    result.require(
        "shapes of the published network", _shapes(variables) == _shapes(variable_shapes(published, (32, 32, 3)))
    )
    kept = {name: array for name, array in state.items() if not name.endswith("num_batches_tracked")}
    back = in_pytorch_form(variables, kept)
    result.exact("names", sorted(back), sorted(kept))
    for name, array in back.items():
        result.exact(name, array, kept[name])
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    result.notes.append(f"{len(state)} arrays, {count} parameters")


def _shapes(variables: Mapping[str, Any]) -> Any:
    return {
        key: jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
        for key, tree in variables.items()
        if tree and key != "knobs"
    }


@functools.partial(jax.jit, static_argnums=0)
def evaluated(network: Any, variables: Mapping[str, Any], images: jax.Array) -> NetworkOutput:
    """The network's output in evaluation mode."""
    return network.apply(variables, images, QuantContext())


def check_images_logits(file: GoldenFile, result: Comparison) -> None:
    """Logits and features of real images from the state of the file's name, and of every other it has arrays of."""
    # Where the images come from, and what the checkpoint says of itself.
    file.not_compared("test_index|epoch|best_prec1")
    named = file.path.stem.removeprefix("resnet20_").removesuffix("_images_logits")
    images, labels = normalised(file["images_u8_nhwc"]), file["labels"]
    for match in file.cases(r"logits(?:_(.+))?$"):
        suffix = match.group().removeprefix("logits")
        network, variables = load_state(file.path, match.group(1) or named)
        output = evaluated(network, variables, images)
        reference = file[match.group()]
        _check_rows(result, match.group(), np.asarray(output.logits), reference, classes=True)
        if f"penultimate{suffix}" in file:
            name = f"penultimate{suffix}"
            _check_rows(result, name, np.asarray(output.features), file[name], classes=False)
        right, wanted = (float(np.mean(rows.argmax(-1) == labels)) for rows in (np.asarray(output.logits), reference))
        result.notes.append(f"{match.group()}: {right:.4f} right (original {wanted:.4f})")


def _check_rows(result: Comparison, what: str, own: np.ndarray, reference: np.ndarray, *, classes: bool) -> None:
    """Almost all images agree closely; one with an activation on a threshold may differ more.

    Args:
      result: collects the comparisons.
      what: name.
      own: (N, D).
      reference: (N, D).
      classes: whether the largest entry of a row is a prediction.
    """
    if own.shape != reference.shape:
        result.require(f"{what}: shape {own.shape} instead of {reference.shape}", False)
        return
    difference = np.abs(own - reference)
    result.at_most(f"{what}, median difference", float(np.median(difference)), 1e-4)
    far = ~(difference.max(axis=1) <= 1e-3)
    result.at_most(f"{what}, share of images beyond 1e-3", float(np.mean(far)), 0.03)
    if classes:
        other = own.argmax(-1) != reference.argmax(-1)
        result.at_most(f"{what}, share of other classes", float(np.mean(other)), 0.01)
