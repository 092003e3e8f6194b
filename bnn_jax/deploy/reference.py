"""Runs a program with numpy, one operation after another: slow, and what the compiled kernels are compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bnn_jax.deploy.graph import Node, Program, compute
from bnn_jax.deploy.weights import Weights

Array = np.ndarray


def run(program: Program, weights: Mapping[str, Weights], images: Array) -> Array:
    """Logits (N, K) of normalised images (N, H, W, C)."""
    return evaluate(np, program, convolver(np, weights, _convolve), pool, images)


def evaluate(xp: Any, program: Program, convolve: Callable, pool: Callable, images: Any) -> Any:
    """Logits of images, in the array library ``xp``; values are dropped where nobody reads them any more."""
    values, left = {0: images}, [len(each) for each in program.consumers()]
    for index, node in enumerate(program.nodes):
        values[index + 1] = compute(xp, node, [values[value] for value in node.inputs], convolve, pool)
        for value in set(node.inputs):
            left[value] -= 1
            if left[value] == 0:
                del values[value]
    return values[len(program.nodes)]


def convolver(xp: Any, weights: Mapping[str, Weights], convolve: Callable) -> Callable[[Any, Node], Any]:
    """What 'conv' and 'dense' do: small integers are multiplied first and scaled then, so that sums are exact."""

    def apply(x: Any, node: Node) -> Any:
        layer, codes = weights[node.options["layer"]], node.options.get("codes")
        integers = layer.integers if codes is not None else None
        if codes is None or integers is None:
            kernel, scale = layer.kernel, None
        else:
            kernel, scale = integers[0].astype(np.float32), integers[1] * np.float32(codes.scale)
            x = xp.round(x / np.float32(codes.scale))
        y = x @ kernel if node.kind == "dense" else convolve(x, kernel, node)
        return y if scale is None else y * scale

    return apply


def _windows(x: Array, window: tuple[int, int], node: Node, value: float) -> Array:
    """(N, H', W', C, kh, kw)."""
    padded = np.pad(x, ((0, 0), *node.options["padding"], (0, 0)), constant_values=value)
    rows, columns = node.options["strides"]
    return np.lib.stride_tricks.sliding_window_view(padded, window, axis=(1, 2))[:, ::rows, ::columns]


def _convolve(x: Array, kernel: Array, node: Node) -> Array:
    windows, groups = _windows(x, kernel.shape[:2], node, 0.0), node.options["groups"]
    if groups == x.shape[-1] == kernel.shape[-1]:
        return np.einsum("nhwcij,ijc->nhwc", windows, kernel[:, :, 0])
    num_in, num_out = kernel.shape[2], kernel.shape[3] // groups
    parts = [
        np.tensordot(
            windows[:, :, :, group * num_in : (group + 1) * num_in],
            kernel[..., group * num_out : (group + 1) * num_out],
            axes=((4, 5, 3), (0, 1, 2)),
        )
        for group in range(groups)
    ]
    return np.concatenate(parts, axis=-1)


def pool(x: Array, node: Node) -> Array:
    """Largest value or sum of each window."""
    if node.kind == "max_pool":
        return _windows(x, node.options["window"], node, -np.inf).max(axis=(4, 5))
    return _windows(x, node.options["window"], node, 0.0).sum(axis=(4, 5))
