"""Checks of whole networks with generated parameters: both modes, every gradient, running statistics, the weights."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from bnn_jax import networks
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.quantizers import QuantContext, build_weight
from bnn_jax.stages import IDENTITY, QuantSpec, spec
from tests.golden.asbq.support import nchw, nhwc
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.weight_search.support import our_path, relative, to_ours, to_pytorch, training_context, values_of

# Of these networks the generated statistics match the random parameters least: evaluation amplifies rounding.
ILL_CONDITIONED = "int-2b_firstlast"


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers as the files define them, float64."""
    return np.random.RandomState(seed).standard_normal(shape)


def generated_parameter(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter; logits of a weight differ by 2**-10 at least."""
    z = normal(seed, shape)
    if name.endswith("alpha"):
        z = np.round(z * 0.5 * 64) / 64 + np.arange(shape[-1]) / 1024
    elif len(shape) == 4:
        z = z * np.sqrt(2 / np.prod(shape[1:]))
    elif len(shape) == 2:
        z = z / np.sqrt(shape[1])
    else:
        z = 1 + 0.1 * z if name.endswith("weight") else 0.1 * z
    return z.astype(np.float32)


def generated_statistic(seed: int, name: str, channels: int) -> np.ndarray:
    """A running mean or variance."""
    if name.endswith("running_var"):
        return (0.5 + np.random.RandomState(seed).rand(channels)).astype(np.float32)
    return (0.1 * normal(seed, (channels,))).astype(np.float32)


class Case:
    """What a ``net`` file stands for.

    Attributes:
      values: candidate list.
      shapes: of the parameters by the release's names, in the file's order.
      paths: ours by the release's names, of parameters and statistics.
      network: Linen module.
      parameters: generated, by the release's names.
      statistics: generated, by the release's names.
    """

    def __init__(self, file: GoldenFile):
        kind = re.fullmatch(r"net_(.+?)_[^_]+(_firstlast)?", file.path.stem)
        assert kind is not None
        seed, self.values = int(file["seed"]), values_of(file["values"])
        names = [str(name) for name in file["param_names"]]
        self.shapes = {n: tuple(map(int, str(s).split())) for n, s in zip(names, file["param_shapes"], strict=True)}
        self.parameters = {n: generated_parameter(seed + j, n, self.shapes[n]) for j, n in enumerate(names)}
        first_layer = 0 if kind.group(1) == "vgg_small" else 1
        buffers = [str(name) for name in file["buffer_names"]]
        self.paths = {n: our_path(n, first_layer=first_layer) for n in names + buffers}
        self.statistics = {
            n: generated_statistic(seed + 5000 + i, n, self.shapes[n.rpartition(".")[0] + ".weight"][0])
            for i, n in enumerate(buffers)
        }
        searched = spec("categorical", values=self.values)
        outer = searched if kind.group(2) else IDENTITY
        quant = QuantSpec(weight=searched, shortcut=searched, first=outer, last=outer)
        classes = next(shape[0] for name, shape in self.shapes.items() if name in ("linear.bias", "fc.bias"))
        self.network = networks.build(spec(f"standard_{kind.group(1)}"), quant, num_classes=classes)

    def variables(self, statistics: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Our variables with the generated parameters and the given statistics."""
        arrays = {self.paths[name]: to_ours(name, a) for name, a in {**self.parameters, **statistics}.items()}
        return unflatten_dict(arrays, sep="/")


def check_net(file: GoldenFile, result: Comparison) -> None:
    """Evaluation, one training pass, its gradients."""
    case = Case(file)
    x = normal(int(file["seed"]) + 9000, tuple(file["x_shape"])).astype(np.float32)
    images, labels = nhwc(x), jnp.asarray(file["labels"], jnp.int32)
    variables = case.variables(case.statistics)
    shapes = {name: tree for name, tree in _shapes(case, images).items() if name != "knobs"}
    expected = {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}
    found = {path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()}
    result.require("names and shapes of all variables", found == expected)
    evaluate = jax.jit(lambda v, x: case.network.apply(v, x, QuantContext()).logits)
    fresh = evaluate(variables, images)
    relative(result, "logits_eval_fresh_bn", fresh, file["logits_eval_fresh_bn"], _eval_tolerance(file))
    matched = case.variables({name: file[f"eval_buf/{name}"] for name in case.statistics})
    relative(result, "logits_eval_matched_bn", evaluate(matched, images), file["logits_eval_matched_bn"], 1e-4)
    loss, logits, after, grads, gx = _training_pass(case, variables, images, labels, file["temp"])
    relative(result, "logits_train", logits, file["logits_train"], 1e-4)
    relative(result, "loss", loss, file["loss"], 1e-4)
    relative(result, "gx", nchw(gx), file["gx"], 1e-3)
    for name in case.statistics:
        relative(result, f"buf_after/{name}", after[case.paths[name]], file[f"buf_after/{name}"], 1e-4)
    _check_gradients(file, result, case, grads)
    _check_weights(file, result, case)


def _eval_tolerance(file: GoldenFile) -> float:
    return 5e-3 if file.path.stem.endswith(ILL_CONDITIONED) else 1e-4


def _shapes(case: Case, images: jax.Array) -> dict[str, Any]:
    shapes = variable_shapes(case.network, images.shape[1:])  # type: ignore[arg-type]
    return {name: collection for name, collection in shapes.items() if collection and name != "knobs"}


def _training_pass(case: Case, variables: dict[str, Any], images: jax.Array, labels: jax.Array, temperature: Any):
    """Loss, logits, statistics after the pass and both gradients, by our paths."""

    @jax.jit
    def run(params: Any, images: jax.Array):
        def loss_function(params: Any, images: jax.Array):
            output, updates = case.network.apply(
                {**variables, "params": params}, images, training_context(temperature), mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(output.logits, labels)
            return jnp.mean(losses), (output.logits, updates)

        return jax.value_and_grad(loss_function, argnums=(0, 1), has_aux=True)(params, images)

    (loss, (logits, updates)), (grads, gx) = run(variables["params"], images)
    return loss, logits, flatten_dict(dict(updates), sep="/"), flatten_dict({"params": grads}, sep="/"), gx


def _check_gradients(file: GoldenFile, result: Comparison, case: Case, grads: Mapping[str, jax.Array]) -> None:
    """Norm, sum, largest entry, first entries and a random projection of every gradient."""
    seed = int(file["seed"])
    for j, name in enumerate(case.shapes):
        g = np.asarray(to_pytorch(name, grads[case.paths[name]]), np.float64)
        norm, largest = float(file["grad_l2"][j]), float(file["grad_absmax"][j])
        result.close(f"grad_l2 {name}", np.linalg.norm(g), norm, rtol=1e-4)
        result.close(f"grad_absmax {name}", np.abs(g).max(), largest, rtol=1e-3)
        # A sum of n numbers of which each may be off by its share of the norm's tolerance: at most sqrt(n) times it.
        result.close(f"grad_sum {name}", g.sum(), file["grad_sum"][j], atol=3e-4 * norm * np.sqrt(g.size))
        head = np.zeros(file["grad_head"].shape[1])
        head[: min(g.size, head.size)] = g.ravel()[: head.size]
        result.close(f"grad_head {name}", head, file["grad_head"][j], atol=1e-3 * largest)
        dot = np.sum(g * normal(seed + 20000 + j, g.shape))
        result.close(f"grad_dot {name}", dot, file["grad_dot"][j], atol=3e-4 * norm)


def _check_weights(file: GoldenFile, result: Comparison, case: Case) -> None:
    """Sums of the weights in use: a wrong index would move one by half a unit or more."""
    quantizer = build_weight(spec("categorical", values=case.values))()
    searched = [str(name) for name in file["quant_layers"]]
    result.exact("quant_layers", searched, [n.removesuffix(".alpha") for n in case.shapes if n.endswith(".alpha")])
    for name, expected in zip(searched, file["weight_sum"], strict=True):
        logits = to_ours(f"{name}.alpha", case.parameters[f"{name}.alpha"])
        w = np.asarray(quantizer.apply({}, logits, QuantContext()), np.float64)
        result.close(f"weight_sum {name}", w.sum(), expected, atol=1e-3)
