"""Checks of whole networks: seeded parameters, and the released checkpoint."""

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnn_jax import networks
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.ops import pruning
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import spec
from bnn_jax.storage import pytorch
from tests.conftest import ROOT
from tests.golden.asbq.support import (
    PRUNED_SHARE,
    bit_widths,
    full_masks,
    nhwc,
    normalised,
    quant_spec,
    resnet,
    to_ours,
    to_pytorch,
)
from tests.golden.comparison import Comparison, GoldenFile


def seeded(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers as the files define them."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def seeded_parameter(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter of a seeded network."""
    r = seeded(seed, shape)
    if len(shape) > 1:
        return r * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return 1 + np.float32(0.1) * r if name.endswith("weight") else np.float32(0.1) * r


def seeded_statistic(seed: int, name: str, channels: int) -> np.ndarray:
    """A running mean or variance of a seeded network."""
    r = seeded(seed, (channels,))
    return 1 + np.float32(0.2) * np.abs(r) if name.endswith("var") else np.float32(0.1) * r


def _model_network(kind: str, shapes: Mapping[str, tuple[int, ...]], bits: int) -> Any:
    """The network a ``model_<kind>`` file is about: the table's entry where there is one of that name."""
    classes = shapes["fc.weight"][0]
    if kind.startswith("vgg"):
        return networks.build(spec("vgg_small"), quant_spec(bits, plain=True), num_classes=classes)
    block = "imagenet" if kind.endswith("imagenet") else "release"
    for name in (kind, kind.removesuffix("_cifar").removesuffix("_imagenet")):
        if name in networks.NETWORKS:
            return networks.build(spec(name, block=block), quant_spec(bits), num_classes=classes)
    return resnet(shapes, bits, block=block, name="resnet18" if block == "imagenet" else "resnet8")


def _our_name(name: str, kind: str) -> str:
    """The original's CIFAR ResNet-18 calls its last BatchNorm ``bn1``; its smaller networks, and ours, ``bn``."""
    return re.sub(r"^bn1\.", "bn.", name) if re.fullmatch("resnet.*_cifar", kind) else name


def check_model(file: GoldenFile, result: Comparison) -> None:
    """A whole network with seeded parameters: logits in both modes, gradient norms, masks."""
    kind, seed = file.path.stem.removeprefix("model_"), int(file["seed"])
    names = [_our_name(str(name), kind) for name in file["param_names"]]
    shapes = {name: tuple(map(int, re.findall(r"\d+", str(s)))) for name, s in zip(names, file["param_shapes"])}
    parameters = {name: seeded_parameter(seed + i, name, shapes[name]) for i, name in enumerate(names)}
    checksums = [np.sum(value, dtype=np.float64) for value in parameters.values()]
    result.close("checksum_param", checksums, file["checksum_param"], atol=1e-3)
    state = dict(parameters)
    for j, name in enumerate(_our_name(str(name), kind) for name in file["running_names"]):
        channels = shapes[name.rpartition(".")[0] + ".weight"][0]
        state[name] = seeded_statistic(seed + 10000 + j, name, channels)
    masks = full_masks(file.group("keep/"), parameters)
    masks |= {f"{layer}.weight_mask": mask for layer, mask in file.group("mask/").items()}
    _check_model_masks(result, parameters, masks)
    # The same run in float64, from which the tolerances were derived.
    file.not_compared(r"k\d+/logits_f64")
    for bits in bit_widths(file, r"k(\d+)/"):
        _check_model_at(file, result, _model_network(kind, shapes, bits), {**state, **masks}, bits)


def _check_model_masks(result: Comparison, state: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> None:
    """Masks that drop anything follow the rule: whole filters in ResNets, 1x2 blocks in VGG-Small."""
    for name, mask in masks.items():
        kernel = to_ours(state[name.removesuffix("mask") + "orig"])
        rule = pruning.filter_mask if name.startswith("layer") else pruning.row_block_mask
        if not mask.all():
            result.exact(name, to_pytorch(rule(kernel, PRUNED_SHARE)), mask)


def _check_model_at(
    file: GoldenFile, result: Comparison, network: Any, state: Mapping[str, np.ndarray], bits: int
) -> None:
    kind = file.path.stem.removeprefix("model_")
    big, few_levels = kind.endswith("imagenet"), bits in (1, 32)
    reference, size = file[f"k{bits}/train_logits"], 224 if big else 32
    images = nhwc(seeded(int(file["seed"]) + 77777, (len(reference), 3, size, size)))
    cotangent = jnp.asarray(seeded(int(file["seed"]) + 88888, reference.shape))
    variables = pytorch.import_state(state, variable_shapes(network, (size, size, 3)))
    eval_logits, train_logits, norms = jax.jit(functools.partial(_run_model, network))(variables, images, cotangent)
    result.close(f"k{bits}/logits", eval_logits, file[f"k{bits}/logits"], atol=_eval_tolerance(big, few_levels))
    tight = few_levels and not big
    result.close(f"k{bits}/train_logits", train_logits, reference, atol=1e-3 if tight else 1.0)
    flat, own = flatten_dict({"params": norms}, sep="/"), {}
    for name in (_our_name(str(name), kind) for name in file["param_names"]):
        own[name] = float(flat[pytorch.to_path(name, ndim=state[name].ndim)])
    _check_gradient_norms(result, f"k{bits}", own, file[f"k{bits}/grad_l2"], tight)


def _run_model(network: Any, variables: dict[str, Any], images: jax.Array, cotangent: jax.Array) -> tuple:
    """Logits in evaluation mode, logits in training mode, and the norm of each parameter's gradient of the latter."""

    def forward(params):
        collections = {**variables, "params": params}
        return network.apply(collections, images, QuantContext(train=True), mutable=["batch_stats"])[0].logits

    train_logits, pullback = jax.vjp(forward, variables["params"])
    norms = jax.tree.map(lambda g: jnp.sqrt(jnp.sum(jnp.square(g))), pullback(cotangent)[0])
    return network.apply(variables, images, QuantContext()).logits, train_logits, norms


def _eval_tolerance(big: bool, few_levels: bool) -> float:
    """Tolerance of logits in evaluation mode; with several bits a value on a rounding threshold may flip."""
    if not few_levels:
        return 0.1
    return 0.2 if big else 1e-3


def _check_gradient_norms(
    result: Comparison, case: str, own: Mapping[str, float], reference: np.ndarray, tight: bool
) -> None:
    """Norms by parameter: equal within 5 %, or within 10 % in the median and 100 % each; 0 where the true one is 0."""
    relative = []
    for (name, norm), expected in zip(own.items(), reference, strict=True):
        if expected < 1e-5:
            result.at_most(f"{case}/grad_l2 of {name}, truly 0", norm, 1e-5)
            continue
        relative.append(abs(norm - expected) / expected)
        result.at_most(f"{case}/grad_l2 of {name}, relative", relative[-1], 0.05 if tight else 1.0)
    if not tight:
        result.at_most(f"{case}/grad_l2, median relative", float(np.median(relative)), 0.1)


def load_checkpoint(state: Mapping[str, np.ndarray], bits: int = 4) -> tuple[Any, dict[str, Any]]:
    """Network (``checkpoint`` block) and variables of a released state; strict.

    Raises:
      CheckpointError: an array is missing, left over or of another shape.
    """
    network = resnet({name: array.shape for name, array in state.items()}, bits, block="checkpoint")
    return network, pytorch.import_state(state, variable_shapes(network, (32, 32, 3)))


def check_checkpoint_state(file: GoldenFile, result: Comparison) -> None:
    """The released state loads strictly; its masks drop whole filters, as many as the 5 % rule says."""
    state = file.group("")
    _, variables = load_checkpoint(state)
    loaded = sum(leaf.size for leaf in jax.tree.leaves(variables))
    wanted = sum(array.size for name, array in state.items() if not name.endswith("num_batches_tracked"))
    result.exact("numbers loaded", loaded, wanted)
    masked = expected = 0
    for name, mask in state.items():
        if not name.endswith("weight_mask"):
            continue
        filters = mask.reshape(mask.shape[0], -1)
        result.require(f"{name} is constant per filter", bool(np.all(filters == filters[:, :1])))
        masked += int(np.sum(filters[:, 0] == 0))
        expected += round(PRUNED_SHARE * mask.shape[0])
    result.exact("masked filters", masked, expected)
    result.notes.append(f"{masked} masked filters")


def _checkpoint_state_for(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The released state: beside the file, else where the full set of files lies beside the checkout."""
    for folder in (path.parent, ROOT.parent / "shared" / "golden" / "asbq"):
        if (folder / "checkpoint_state.npz").exists():
            return GoldenFile(folder / "checkpoint_state.npz").group("")
    raise FileNotFoundError(f"{path.name} needs checkpoint_state.npz beside it or in ../shared/golden/asbq")


def check_checkpoint_eval(file: GoldenFile, result: Comparison) -> None:
    """Logits of the released checkpoint on stored images, against the original's float32 and float64 runs."""
    network, variables = load_checkpoint(_checkpoint_state_for(file.path))
    forward = jax.jit(lambda images: network.apply(variables, images, QuantContext()).logits)
    # Where the images come from; they are compared with nothing.
    file.not_compared("files|clean_index")
    for prefix in (match.group(1) for match in file.cases(r"(.*)images$")):
        logits, labels = np.asarray(forward(normalised(file[prefix + "images"]))), file[prefix + "labels"]
        _check_logits(result, prefix + "logits", logits, file[prefix + "logits"])
        # Any two float32 runs, and the float64 run, flip different images: here only the bounds on all images hold.
        _check_logits(result, prefix + "logits_f64", logits, file[prefix + "logits_f64"], close_share=None)
        right = int(np.sum(logits.argmax(-1) == labels))
        reference = int(np.sum(file[prefix + "logits"].argmax(-1) == labels))
        result.at_most(f"{prefix}images right, difference", abs(right - reference), 0.01 * len(labels))
        result.notes.append(f"{prefix}images right: {right} of {len(labels)} (original {reference})")


def _check_logits(
    result: Comparison, what: str, own: np.ndarray, reference: np.ndarray, close_share: float | None = 0.85
) -> None:
    """Most images agree closely; one with an activation on a rounding threshold may differ more."""
    if own.shape != reference.shape:
        result.require(f"{what}: shape {own.shape} instead of {reference.shape}", False)
        return
    difference = np.abs(own - reference).max(axis=1)
    if close_share is not None:
        result.at_most(f"{what}, share of images beyond 2e-3", float(np.mean(~(difference <= 2e-3))), 1 - close_share)
    result.at_most(f"{what}, largest difference", float(difference.max()), 1.0)
    result.at_most(f"{what}, share of other classes", float(np.mean(own.argmax(-1) != reference.argmax(-1))), 0.01)
