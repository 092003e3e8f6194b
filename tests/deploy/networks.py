"""Networks for the tests of deployment: a small one with any quantizers, and those of the table in small."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import networks
from bnn_jax.deploy import artefact
from bnn_jax.deploy.graph import Program
from bnn_jax.deploy.trace import trace
from bnn_jax.deploy.weights import Weights
from bnn_jax.layers.conv import QuantConv, QuantDense
from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import NetworkOutput
from bnn_jax.ops.ste import hard_tanh
from bnn_jax.quantizers import QuantContext, build_act, build_weight
from bnn_jax.quantizers.base import evaluation_context
from bnn_jax.stages import QuantSpec, Spec, spec


class Tiny(nn.Module):
    """Float convolution, two quantized ones with BatchNorm, one of them with a shortcut, classifier."""

    weight: Spec
    act: Spec
    channels: int = 12

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        conv = functools.partial(
            QuantConv, weight_quantizer=build_weight(self.weight), act_quantizer=build_act(self.act)
        )
        x = hard_tanh(BatchNorm(name="bn0")(QuantConv(self.channels, name="conv0")(x, ctx), ctx))
        x = x + BatchNorm(name="bn1")(conv(self.channels, name="conv1")(x, ctx), ctx)
        x = hard_tanh(BatchNorm(name="bn2")(conv(20, strides=(2, 2), name="conv2")(x, ctx), ctx))
        features = jnp.mean(x, axis=(1, 2))
        return NetworkOutput(logits=QuantDense(7, name="fc")(features, ctx), features=features)


def variables_of(network: Any, images: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Variables as after some training: nothing is at its neutral start."""
    init = jax.jit(lambda key, x: network.init(key, x, QuantContext()))
    variables = dict(init(jax.random.key(seed), jnp.asarray(images[:2])))
    random = np.random.default_rng(seed)

    def moved(value: jax.Array) -> jax.Array:
        noise = random.normal(0, 0.05, value.shape).astype(np.float32)
        return value + noise * (1 + np.abs(np.asarray(value)))

    variables["params"] = jax.tree.map(moved, variables["params"])
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(lambda v: jnp.abs(moved(v)) + 0.05, variables["batch_stats"])
    return variables


def images_of(shape: tuple[int, int, int], count: int = 5) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, (count, *shape)).astype(np.float32)


def exported(
    network: Any, images: np.ndarray, context: QuantContext | None = None
) -> tuple[Program, dict[str, Weights], np.ndarray]:
    """Operations, weights, and what the network itself answers to the images."""
    variables = variables_of(network, images)
    context = evaluation_context(variables) if context is None else context
    program, weights = trace(network, variables, images.shape[1:], context)  # type: ignore[arg-type]
    answer = jax.jit(lambda v, x: network.apply(v, x, context).logits)(variables, jnp.asarray(images))
    return program, weights, np.asarray(answer)


def tiny(weight: Spec, act: Spec, size: int = 9) -> tuple[Program, dict[str, Weights], np.ndarray, np.ndarray]:
    """The small network exported: operations, weights, images and its answers."""
    images = images_of((size, size, 3))
    return *exported(Tiny(weight, act), images), images


def save(path: Path, program: Program, weights: dict[str, Weights], **facts: Any) -> Path:
    artefact.save(path, program, weights, {"network": "tiny", "mean": [0.5] * 3, "std": [0.25] * 3, **facts})
    return path


def small(name: str) -> tuple[Any, tuple[int, int, int]]:
    """A network of the table with fewer and narrower layers, and the shape of its images."""
    options: dict[str, Any] = {}
    if "mlp" in name:
        return build(name, hidden=72), (5, 5, 1)
    if "vgg" in name:
        return build(name, widths=(8, 12, 16, 16, 20, 24)), (16, 16, 3)
    if "mobilenet" in name:
        return build(name, branches=2, rows=((1, 8, 1, 1), (2, 16, 1, 2), (2, 16, 1, 1))), (16, 16, 3)
    is_large = any(part in name for part in ("18", "34", "50")) and "cifar" not in name
    options = {"stage_sizes": (1, 2), "widths": (8, 16)}
    if name.startswith("basq"):
        options["branches"] = 2
    return build(name, **options), (32, 32, 3) if is_large else (8, 8, 3)


def build(name: str, **options: Any) -> Any:
    quant = QuantSpec(
        weight=spec("lsq", bits=2) if name.startswith("basq") else spec("irnet"),
        act=spec("lsq", bits=2) if name.startswith("basq") else spec("sign"),
        searched=spec("branch_clip", bits=2),
    )
    return networks.build(spec(name, **options), quant, num_classes=10)
