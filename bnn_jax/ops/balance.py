"""Balanced, standardised weights and their power-of-two scale (IR-Net)."""

import jax
import jax.numpy as jnp


def standardize(w: jax.Array) -> jax.Array:
    """Weights with mean 0 and standard deviation 1 in every output filter.

    Forward: ``(w - mean(w)) / std(w)`` over all axes but the last; the standard deviation is unbiased (n - 1) and has
      no epsilon. A constant filter becomes 0.
    Backward: ordinary differentiation, through mean and standard deviation, so that the gradient of every filter is
      orthogonal to 1 and to the centred weights.

    Args:
      w: (..., O), at least 2 weights per filter, float32.

    Returns:
      Array of the shape of ``w``.

    Reference: IR-Net, Qin et al. 2020 (arXiv 1909.10788), equation 7; release: divides 0 by 0 for a constant filter.
    """
    axes = tuple(range(w.ndim - 1))
    centred = w - jnp.mean(w, axis=axes, keepdims=True)
    count = w.size // w.shape[-1]
    variance = jnp.sum(jnp.square(centred), axis=axes, keepdims=True) / (count - 1)
    # The inner where keeps the gradient of the root finite where the variance is 0.
    return centred / jnp.sqrt(jnp.where(variance == 0, 1.0, variance))


def power_of_two_scale(w: jax.Array) -> jax.Array:
    """Power of two next to the mean magnitude of every output filter, without gradient.

    Forward: ``2**round(log2(mean |w|))``, ties of the exponent to even; 1 for an all-zero filter.

    Args:
      w: (..., O), float32.

    Returns:
      (O,), float32.

    Reference: IR-Net, Qin et al. 2020 (arXiv 1909.10788), equation 9.
    """
    mean = jax.lax.stop_gradient(jnp.mean(jnp.abs(w), axis=tuple(range(w.ndim - 1))))
    return jnp.exp2(jnp.round(jnp.log(jnp.where(mean == 0, 1.0, mean)) / jnp.log(2.0)))
