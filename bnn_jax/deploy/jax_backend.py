"""Runs a program with jax, jit-compiled, on whatever device jax has."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.deploy.graph import Node, Program
from bnn_jax.deploy.reference import convolver, evaluate
from bnn_jax.deploy.weights import Weights


def function(program: Program, weights: Mapping[str, Weights]) -> Callable[[jax.Array], jax.Array]:
    """(N, H, W, C) normalised images -> logits (N, K), traceable."""
    convolve = convolver(jnp, weights, _convolve)

    def logits(images: jax.Array) -> jax.Array:
        # Constants are (C,) whatever the value's axes are.
        with jax.numpy_rank_promotion("allow"):
            return evaluate(jnp, program, convolve, _pool, images)

    return logits


def compile_program(program: Program, weights: Mapping[str, Weights]) -> Callable[[np.ndarray], np.ndarray]:
    """The same on arrays of numpy; compiled once for each number of images."""
    run = jax.jit(function(program, weights))
    return lambda images: np.asarray(run(images))


def _convolve(x: jax.Array, kernel: jax.Array, node: Node) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        node.options["strides"],
        node.options["padding"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=node.options["groups"],
        precision=jax.lax.Precision.HIGHEST,
    )


def _pool(x: jax.Array, node: Node) -> jax.Array:
    start, combine = (-jnp.inf, jax.lax.max) if node.kind == "max_pool" else (0.0, jax.lax.add)
    window, strides = (1, *node.options["window"], 1), (1, *node.options["strides"], 1)
    return jax.lax.reduce_window(x, start, combine, window, strides, ((0, 0), *node.options["padding"], (0, 0)))
