"""Uniform quantization of weights and activations (DoReFa family, as used by ASBQ).

``levels(bits) = 2**bits - 1`` is the number of steps. Statistics of the weight (its largest magnitude, its mean
magnitude) are taken over the whole tensor and carry no gradient.
"""

import jax
import jax.numpy as jnp

from bnn_jax.ops import ste


def dorefa_weight_range(w: jax.Array) -> jax.Array:
    """Largest magnitude after tanh, ``M = max |tanh(w)|``, without gradient.

    Args:
      w: weights of any shape.

    Returns:
      Scalar in [0, 1).
    """
    return jax.lax.stop_gradient(jnp.max(jnp.abs(jnp.tanh(w))))


def dorefa_weight(w: jax.Array, bits: int) -> jax.Array:
    """Quantizes weights to ``2**bits`` symmetric levels that exclude zero.

    Forward: ``t = tanh(w)``, ``M = max|t|``, ``v = t/2/M + 1/2``, ``n = 2**bits - 1``,
      ``Q = M * (2 * round(v*n)/n - 1)``; the levels are ``M * (2*i/n - 1)`` for i = 0..n.
      Ties go to the even neighbour, so a weight of exactly 0 becomes ``+M/n``. An all-zero tensor stays zero.
    Backward: ``dw = dQ * (1 - tanh(w)**2)``; M is a constant.

    Args:
      w: weights of any shape, float32.
      bits: 2 to 8.

    Returns:
      Array of the shape of ``w``.

    Reference: DoReFa-Net (arXiv 1606.06160), equation 9; release: Luadoo/ASBQ: quantization/q_funcs.py keeps the output
      scale M instead of 1.
    """
    n = float(2**bits - 1)
    t = jnp.tanh(w)
    m = jax.lax.stop_gradient(jnp.max(jnp.abs(t)))
    # A tensor of zeros has no range: dividing by 1 keeps its value at M * (...) = 0 instead of 0/0.
    v = t / 2 / jnp.where(m == 0, 1.0, m) + 0.5
    return m * (2 * (ste.round_half_even(v * n) / n) - 1)


def mean_magnitude(w: jax.Array) -> jax.Array:
    """Mean magnitude ``E = mean |w|`` over the whole tensor, without gradient.

    Args:
      w: weights of any shape.

    Returns:
      Scalar, >= 0.
    """
    return jax.lax.stop_gradient(jnp.mean(jnp.abs(w)))


@ste.straight_through
def sign_weight(w: jax.Array) -> jax.Array:
    """Binary weights with one scale per tensor.

    Forward: ``Q = E * sign(w)`` with ``E = mean |w|`` and ``sign(0) = +1``; two levels, -E and +E.
    Backward: ``dw = dQ`` (no clipping, and the factor E does not enter).

    Args:
      w: weights of any shape, float32.

    Returns:
      Array of the shape of ``w``.

    Reference: DoReFa-Net (arXiv 1606.06160), equation 7.
    """
    return mean_magnitude(w) * ste.sign_positive_zero(w)


@ste.straight_through
def integer_levels_weight(w: jax.Array) -> jax.Array:
    """Weights rounded to integer multiples of their mean magnitude: the released "1-bit" rule.

    Forward: ``Q = E * sign(w) * floor(|w|/E + 1/2)`` with ``E = mean |w|``; levels ..., -2E, -E, 0, E, 2E, ...
      (ties away from zero); zero where ``|w| < E/2``. It is not binary. An all-zero tensor stays zero.
    Backward: ``dw = dQ`` (no clipping).

    Args:
      w: weights of any shape, float32.

    Returns:
      Array of the shape of ``w``.

    Reference: release: Luadoo/ASBQ: quantization/q_funcs.py, which divides 0 by 0 for an all-zero tensor.
    """
    scale = mean_magnitude(w)
    return scale * ste.round_half_away(w / jnp.where(scale == 0, 1.0, scale))


def dorefa_activation(x: jax.Array, bits: int) -> jax.Array:
    """Quantizes activations to ``2**bits`` levels in [0, 1].

    Forward: ``y = clip(x, 0, 1)``, ``n = 2**bits - 1``; ``q = round(y*n)/n`` with ties to even for bits >= 2, and
      ``q = floor(y + 1/2)`` for 1 bit, so that 0.5 becomes 1. Levels i/n, i = 0..n.
    Backward: ``dx = dq`` where ``0 < x < 1``, else 0.

    Args:
      x: activations of any shape, float32.
      bits: 1 to 8.

    Returns:
      Array of the shape of ``x``, values in [0, 1].

    Reference: DoReFa-Net (arXiv 1606.06160), equations 5 and 11.
    """
    y = ste.clip_unit(x)
    if bits == 1:
        return ste.round_half_away(y)
    n = float(2**bits - 1)
    return ste.round_half_even(y * n) / n
