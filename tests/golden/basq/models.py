"""Checks of blocks and of whole tiny supernets."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnn_jax import objectives
from bnn_jax.networks import build_layers
from bnn_jax.networks.searched import SearchedMobileBlock
from bnn_jax.objectives.base import Batch, Outputs
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import spec
from tests.golden.asbq.support import nchw, nhwc
from tests.golden.basq.support import BRANCHES, Variables, place_of, quant_spec, relative_to_largest, tiny_network
from tests.golden.comparison import Comparison, GoldenFile


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Tree of collections from flat paths, on the device."""
    return unflatten_dict({path: jnp.asarray(value) for path, value in flat.items()}, sep="/")


def flat_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path."""
    return flatten_dict(tree, sep="/")


def variable_shapes_of(network: Any, x: jax.Array) -> dict[str, Any]:
    """Flat shapes of a network's or a block's variables."""
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    return flat_of(jax.eval_shape(lambda x: network.init(keys, x, QuantContext(train=True)), x))


def check_blocks(file: GoldenFile, result: Comparison) -> None:
    """Blocks in evaluation, and one training pass with its gradients and running statistics."""
    for name in file["names"]:
        _check_block(file, result, f"{name}/")


def _check_block(file: GoldenFile, result: Comparison, case: str) -> None:
    file.not_compared(f"{case}margin")
    channels, features, stride, expansion, bits = (int(v) for v in file[f"{case}conf"])
    block = SearchedMobileBlock(features, stride, expansion, 0, BRANCHES, build_layers(quant_spec(bits)))
    x = nhwc(file[f"{case}x"])
    assert x.shape[-1] == channels
    names = Variables(variable_shapes_of(block, x))
    variables = nested(names.to_ours(file.group(f"{case}p/")))
    ctx = QuantContext(choice=jnp.asarray(file[f"{case}eval_sel"])[None])
    result.close(f"{case}eval_y", nchw(jax.jit(block.apply)(variables, x, ctx)), file[f"{case}eval_y"], atol=2e-5)
    ctx = QuantContext(train=True, choice=jnp.asarray(file[f"{case}train_sel"])[None])

    @jax.jit
    def train(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            return block.apply({**variables, "params": params}, x, ctx, mutable=["batch_stats"])

        y, pullback, updates = jax.vjp(forward, params, x, has_aux=True)
        return y, pullback(cotangent), updates

    y, (grads, dx), updates = train(variables["params"], x, nhwc(file[f"{case}ct"]))
    result.close(f"{case}train_y", nchw(y), file[f"{case}train_y"], atol=2e-5)
    relative_to_largest(result, f"{case}train_dx", nchw(dx), file[f"{case}train_dx"], 1e-5)
    compare_gradients(result, names, flat_of({"params": grads}), file.group(f"{case}g/"), case=case, tolerance=3e-5)
    compare_statistics(result, names, updates, file.group(f"{case}bnafter/"), case=case, tolerance=1e-5)


def compare_gradients(
    result: Comparison,
    names: Variables,
    own: Mapping[str, Any],
    reference: Mapping[str, np.ndarray],
    *,
    case: str,
    tolerance: float,
) -> None:
    """Gradients with a stored value agree; branches without one have a gradient of 0."""
    by_name = names.by_name(own, reference)
    expected = {name: array for name, array in reference.items() if place_of(name, head=names.head) is not None}
    result.require(f"{case}g: all gradients are compared", set(by_name) == set(expected))
    for name, value in by_name.items():
        # A bias in front of a BatchNorm has no true gradient: round-off on the scale of the terms that cancel.
        atol = 1e-4 if name.endswith("last.bias") or "bn1_last" in name else 0.0
        largest = float(np.max(np.abs(reference[name])))
        result.close(f"{case}g/{name}", value, reference[name], atol=tolerance * largest + atol)
    covered = {place_of(name, head=names.head) for name in expected}
    for path, value in own.items():
        rows = range(BRANCHES) if (path, 0) in _branched(names, path) else ()
        others = [np.abs(np.asarray(value)[j]).max() for j in rows if (path, j) not in covered]
        if others:
            result.at_most(f"{case}{path}, gradient of the other branches", max(others), 0.0)


def _branched(names: Variables, path: str) -> set[tuple[str, int]]:
    """{(path, 0)} for a variable with a branch axis."""
    is_branched = "depthwise/norm" in path or path.endswith("upper_bound")
    return {(path, 0)} if is_branched else set()


def compare_statistics(
    result: Comparison,
    names: Variables,
    updates: Mapping[str, Any],
    reference: Mapping[str, np.ndarray],
    *,
    case: str,
    tolerance: float,
) -> None:
    """Running statistics after a training pass."""
    by_name = names.by_name(flat_of(updates), reference)
    result.require(f"{case}bnafter: all are compared", set(by_name) == set(reference))
    for name, value in by_name.items():
        result.close(f"{case}bnafter/{name}", value, reference[name], atol=tolerance, rtol=tolerance)


def check_distillation(file: GoldenFile, result: Comparison) -> None:
    """Cross-entropy with the teacher's probabilities, and its gradient."""
    for number in range(int(file["n_cases"])):
        case = f"c{number}_"
        student, teacher = jnp.asarray(file[f"{case}student"]), jnp.asarray(file[f"{case}teacher"])
        loss, gradient = jax.value_and_grad(distillation)(student, teacher)
        result.close(f"{case}loss", loss, file[f"{case}loss"], atol=3e-5)
        result.close(f"{case}dstudent", gradient, file[f"{case}dstudent"], atol=1e-6)


def distillation(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The loss of the supernet's training."""
    term = objectives.build(spec("distillation", weight=1.0, temperature=1.0, measure="cross_entropy"))
    rows = student.shape[0]
    batch = Batch(images=student, labels=jnp.zeros(rows, jnp.int32), mask=jnp.ones(rows, bool))
    outputs = Outputs(logits=student, features=student, teacher_logits=teacher)
    return term(outputs, batch, {}, QuantContext(train=True))


def check_supernet(file: GoldenFile, result: Comparison) -> None:
    """A tiny supernet: logits of several paths, and one training pass with gradients and running statistics."""
    file.not_compared("margin|eval_logits_f64")
    network, head = tiny_network(
        file["setting_tcns"],
        head_width=int(file["last_channel"]),
        num_classes=int(file["num_classes"]),
        quant=quant_spec(int(file["bits"])),
    )
    x = nhwc(file["x"])
    names = Variables(variable_shapes_of(network, x), head)
    variables = nested(names.to_ours(file.group("p/")))
    paths = jnp.asarray(file["archs"], jnp.int32)
    # All paths in one program: the path is data.
    logits = jax.jit(jax.vmap(lambda path: network.apply(variables, x, QuantContext(choice=path)).logits))(paths)
    result.close("eval_logits", logits, file["eval_logits"], atol=1e-5)
    ctx = QuantContext(train=True, choice=paths[0])
    teacher = jnp.asarray(file["teacher"])

    @jax.jit
    def train(params: Any) -> Any:
        def loss(params: Any) -> Any:
            output, updates = network.apply({**variables, "params": params}, x, ctx, mutable=["batch_stats"])
            return distillation(output.logits, teacher), (output.logits, updates)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (train_logits, updates)), grads = train(variables["params"])
    result.close("train_logits_arch0", train_logits, file["train_logits_arch0"], atol=1e-5)
    result.close("train_kd_loss_arch0", loss, file["train_kd_loss_arch0"], atol=1e-6)
    compare_gradients(result, names, flat_of({"params": grads}), file.group("g/"), case="", tolerance=5e-5)
    compare_statistics(result, names, updates, file.group("bnafter/"), case="", tolerance=2e-5)
    _check_without_gradient(file, result, names)


def _check_without_gradient(file: GoldenFile, result: Comparison, names: Variables) -> None:
    """The parameters the published program has no gradient for are the other branches' and the constants."""
    genes = [int(gene) for gene in file["archs"][0]]
    expected = set()
    for name in file.group("p/"):
        if "running_" in name:
            continue
        place = place_of(name, head=names.head)
        if place is None:
            expected.add(name)
            continue
        path, branch = place
        if branch is not None and branch != genes[int(path.split("/")[1].removeprefix("block_")) - 1]:
            expected.add(name)
    result.require("no_grad_params", expected == set(map(str, file["no_grad_params"])))
