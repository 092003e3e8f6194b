"""Uniform quantization with a learned step per channel (LSQ), as BASQ uses it for weights and for 1x1 inputs."""

import jax
import jax.numpy as jnp


def weight_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a weight: symmetric, ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1``.

    2 bits give three levels (ternary weights), 3 bits 7, 4 bits 15.

    Args:
      bits: 2 to 8.
    """
    highest = 2 ** (bits - 1) - 1
    return -highest, highest


def activation_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of an activation: 0 to ``2**bits - 1``.

    Args:
      bits: 1 to 8.
    """
    return 0, 2**bits - 1


def initial_step(x: jax.Array, highest: int, *, mask: jax.Array | None = None) -> jax.Array:
    """Step of every channel from the values it will quantize: ``2 * mean|x_c| / sqrt(highest)``.

    Args:
      x: weights (..., C) or activations (N, ..., C); the last axis is the channel.
      highest: largest code p.
      mask: (N,) bool, the rows of ``x`` that count; None means all.

    Returns:
      (C,), float32.

    Reference: LSQ, Esser et al. 2020 (arXiv 1902.08153), section 2.1.
    """
    axes = tuple(range(x.ndim - 1))
    magnitude = jnp.abs(x)
    if mask is None:
        mean = jnp.mean(magnitude, axis=axes)
    else:
        rows = mask.reshape((-1,) + (1,) * (x.ndim - 1))
        count = jnp.maximum(jnp.sum(mask), 1) * (x[0].size // x.shape[-1])
        mean = jnp.sum(jnp.where(rows, magnitude, 0.0), axis=axes) / count
    return 2 * mean / jnp.sqrt(jnp.float32(highest))


def gradient_scale(count: jax.Array | float, highest: int) -> jax.Array:
    """Factor on the gradient of the steps, ``1 / sqrt(count * highest)``.

    Args:
      count: number N of values in the WHOLE tensor, all channels together.
      highest: largest code p.

    Reference: LSQ (arXiv 1902.08153), section 2.2, which counts N per step; release: HanByulKim/BASQ: mbv2_supernet.py
      counts all values of the tensor.
    """
    return 1.0 / jnp.sqrt(jnp.asarray(count, jnp.float32) * highest)


def codes(x: jax.Array, step: jax.Array, lowest: jax.Array | int, highest: jax.Array | int) -> jax.Array:
    """``round(clip(x / step, lowest, highest))`` as floats, ties to the even integer; 0 where the step is 0.

    Args:
      x: (..., C).
      step: (C,).
      lowest: smallest code.
      highest: largest code.
    """
    return jnp.round(jnp.clip(_ratio(x, step), lowest, highest))


def _per_channel(step: jax.Array, x: jax.Array) -> jax.Array:
    return step.reshape((1,) * (x.ndim - 1) + (-1,))


def _ratio(x: jax.Array, step: jax.Array) -> jax.Array:
    step = _per_channel(step, x)
    # Only a channel of zeros has a step of 0: its codes are 0 whatever it is divided by.
    return x / jnp.where(step == 0, 1.0, step)


@jax.custom_vjp
def _quantize(x: jax.Array, step: jax.Array, scale: jax.Array, limits: jax.Array) -> jax.Array:
    return codes(x, step, limits[0], limits[1]) * _per_channel(step, x)


def _forward(x: jax.Array, step: jax.Array, scale: jax.Array, limits: jax.Array):
    return _quantize(x, step, scale, limits), (x, step, scale, limits)


def _backward(residuals: tuple, cotangent: jax.Array):
    x, step, scale, limits = residuals
    ratio = _ratio(x, step)
    # Both bounds belong to the range; jnp.clip would halve the gradient there.
    inside = (ratio >= limits[0]) & (ratio <= limits[1])
    error = codes(x, step, limits[0], limits[1]) - jnp.where(inside, ratio, 0.0)
    step_gradient = scale * jnp.sum(cotangent * error, axis=tuple(range(x.ndim - 1)))
    return jnp.where(inside, cotangent, 0.0), step_gradient, jnp.zeros_like(scale), jnp.zeros_like(limits)


_quantize.defvjp(_forward, _backward)


def learned_step(
    x: jax.Array, step: jax.Array, *, lowest: int, highest: int, scale: jax.Array | float = 1.0
) -> jax.Array:
    """Rounds every channel to multiples of its own step.

    Forward: ``v = x / s``, ``y = round(clip(v, n, p)) * s`` with ties to even. A channel whose step is 0 gives 0.
    Backward: ``dx = dy`` where ``n <= v <= p`` (bounds included), else 0;
      ``ds_c = g * sum over channel c of dy * (round(clip(v, n, p)) - (v where n <= v <= p, else 0))``.

    Args:
      x: (..., C), float32; the last axis is the channel.
      step: (C,), the steps s.
      lowest: smallest code n.
      highest: largest code p.
      scale: factor g on the gradient of the steps, see ``gradient_scale``.

    Returns:
      Array of the shape of ``x``.

    Reference: LSQ, Esser et al. 2020 (arXiv 1902.08153), equations 1 to 3; release: HanByulKim/BASQ: mbv2_supernet.py.
    """
    return _quantize(x, step, jnp.asarray(scale, jnp.float32), jnp.array([lowest, highest], jnp.float32))
