"""Depthwise convolution as a sum of shifted products: what a CPU does fastest.

XLA's convolution with as many groups as channels is 1.6 to 9 times slower on a CPU (``benchmarks/depthwise.py``). On an
accelerator it is the convolution of its library.
"""

import functools

import jax
import jax.numpy as jnp

Pair = tuple[int, int]


def _taps(x: jax.Array, size: tuple[int, ...], strides: Pair, output: tuple[int, ...]) -> list[list[jax.Array]]:
    """For each position of the kernel the values of ``x`` (N, H, W, C) it meets, (N, *output, C)."""

    def tap(row: int, column: int) -> jax.Array:
        starts = (0, row, column, 0)
        ends = (
            x.shape[0],
            row + (output[0] - 1) * strides[0] + 1,
            column + (output[1] - 1) * strides[1] + 1,
            x.shape[3],
        )
        return jax.lax.slice(x, starts, ends, (1, *strides, 1))

    return [[tap(row, column) for column in range(size[1])] for row in range(size[0])]


def _weighted_sum(taps: list[list[jax.Array]], kernel: jax.Array) -> jax.Array:
    total = None
    for row, values in enumerate(taps):
        for column, value in enumerate(values):
            product = value * kernel[row, column].reshape(1, 1, 1, -1)
            total = product if total is None else total + product
    assert total is not None  # a kernel has a position
    return total


def _output_size(x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair]) -> Pair:
    rows, columns = (
        (x.shape[1 + axis] + sum(padding[axis]) - kernel.shape[axis]) // strides[axis] + 1 for axis in (0, 1)
    )
    return rows, columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_convolution(x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair]) -> jax.Array:
    """Convolves every channel with its own kernel.

    Forward: ``y[n, h, w, c] = sum_ij x_padded[n, s*h + i, s*w + j, c] * kernel[i, j, 0, c]``.
    Backward: that of the convolution.

    Args:
      x: (N, H, W, C).
      kernel: (kh, kw, 1, C).
      strides: (vertical, horizontal).
      padding: ((top, bottom), (left, right)), zeros.

    Returns:
      (N, H', W', C).
    """
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    taps = _taps(padded, kernel.shape[:2], strides, _output_size(x, kernel, strides, padding))
    return _weighted_sum(taps, kernel)


def _forward(x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair]):
    return depthwise_convolution(x, kernel, strides, padding), (x, kernel)


def _backward(strides: Pair, padding: tuple[Pair, Pair], residuals: tuple, cotangent: jax.Array):
    x, kernel = residuals
    size = kernel.shape[:2]
    # The input's gradient is the convolution of the cotangent, with zeros between its values, with the turned kernel.
    config = [(0, 0, 0)]
    for axis in (0, 1):
        spread = (cotangent.shape[1 + axis] - 1) * strides[axis] + 1
        before = size[axis] - 1 - padding[axis][0]
        config.append((before, x.shape[1 + axis] + size[axis] - 1 - before - spread, strides[axis] - 1))
    spread = jax.lax.pad(cotangent, jnp.zeros((), cotangent.dtype), [*config, (0, 0, 0)])
    x_gradient = _weighted_sum(_taps(spread, size, (1, 1), x.shape[1:3]), kernel[::-1, ::-1])
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows = [
        jnp.stack([jnp.sum(value * cotangent, axis=(0, 1, 2)) for value in values])
        for values in _taps(padded, size, strides, cotangent.shape[1:3])
    ]
    return x_gradient, jnp.stack(rows).reshape(kernel.shape)


depthwise_convolution.defvjp(_forward, _backward)
