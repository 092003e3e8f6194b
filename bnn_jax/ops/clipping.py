"""Uniform quantization of activations between 0 and a learned clip value (PACT), as BASQ searches it."""

import functools
import struct

import jax
import jax.numpy as jnp


def step_fraction(bits: int) -> float:
    """Size of a quantization step as a share of the clip value, as the published program computes it.

    ``c = 1 - (1 - 1/L)``, L = 2**bits - 1: the inner difference in double precision, rounded to float32, the outer in
    float32. That is a little less than 1/L (0.33333331 at 2 bits), and it decides where values in the exact middle of
    two levels go: up, never to the even one. Shares of 1/255 and less become exactly 1/255.

    Args:
      bits: 1 to 8.

    Returns:
      A float32 number.

    Reference: release: HanByulKim/BASQ: mbv2_supernet.py.
    """
    levels = 2**bits - 1
    share, least = _float32(1.0 - _float32(1.0 - 1.0 / levels)), _float32(1.0 / 255.0)
    return max(share, least)


def _float32(value: float) -> float:
    """The float32 number nearest to a double."""
    return struct.unpack("f", struct.pack("f", value))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def clipped_uniform(x: jax.Array, bound: jax.Array, bits: int) -> jax.Array:
    """Clips to [0, bound] and rounds to ``2**bits`` levels.

    Forward: ``x' = clip(x, 0, a)``, ``d = a * step_fraction(bits)``, ``y = round(x' / d) * d``; levels 0, d, ..., L*d,
      where L*d is a within an ulp or two. A bound of 0 or less gives zeros (the published program divides 0 by 0 at 0).
    Backward: ``dx = dy`` where ``0 < x < a`` (both strict); ``da = sum of dy where x > a`` (strict). At ``x == a``
      neither gets a gradient. There is no gradient of the rounding error and no scale.

    Args:
      x: activations of any shape, float32.
      bound: the clip value a, scalar.
      bits: 1 to 8.

    Returns:
      Array of the shape of ``x``.

    Reference: PACT, Choi et al. 2018 (arXiv 1805.06085); BASQ, Kim et al. 2022; release: HanByulKim/BASQ:
      mbv2_supernet.py.
    """
    step = bound * step_fraction(bits)
    clipped = jnp.clip(x, 0.0, jnp.maximum(bound, 0.0))
    return jnp.round(clipped / jnp.where(step > 0, step, 1.0)) * jnp.where(step > 0, step, 0.0)


def _forward(x: jax.Array, bound: jax.Array, bits: int):
    return clipped_uniform(x, bound, bits), (x, bound)


def _backward(bits: int, residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, bound = residuals
    inside = (x > 0) & (x < bound)
    return jnp.where(inside, cotangent, 0.0), jnp.sum(jnp.where(x > bound, cotangent, 0.0))


clipped_uniform.defvjp(_forward, _backward)


def rectified_clamp(w: jax.Array, quantile: jax.Array | float) -> jax.Array:
    """Clips weights to their quantiles ``1 - tau`` and ``tau`` (rectified clamp unit).

    Forward: ``clip(w, -Q, Q)``, ``Q = -b log(2 - 2 tau)``: the quantile of a Laplace distribution around 0, whose scale
      ``b = mean |w|`` is its most likely one.
    Backward: ``dw = dy`` where ``|w| < Q``, else 0; none through Q.

    Args:
      w: weights of a layer, float32.
      quantile: tau, scalar, 0.5 <= tau < 1.

    Reference: ReCU, Xu et al. 2021 (arXiv 2103.12369), section 4.
    """
    limit = -jnp.mean(jnp.abs(w)) * jnp.log(2 - 2 * jnp.asarray(quantile, w.dtype))
    limit = jax.lax.stop_gradient(limit)
    return jnp.where(jnp.abs(w) < limit, w, jax.lax.stop_gradient(jnp.clip(w, -limit, limit)))
