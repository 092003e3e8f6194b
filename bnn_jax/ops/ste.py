"""Rounding and sign with straight-through gradients.

Every function here documents its forward and backward rule and its value at zero and at ties.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def straight_through(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Decorator: keeps the function's value and makes its gradient the identity.

    Forward: ``y = function(x)``; y has the shape of x.
    Backward: ``dx = dy``.

    Args:
      function: array -> array of the same shape.

    Returns:
      A function with the same value and docstring.

    Reference: straight-through estimator, Bengio et al. 2013 (arXiv 1308.3432), section 4.
    """
    wrapped = functools.wraps(function)(jax.custom_vjp(function))
    wrapped.defvjp(lambda x: (function(x), None), lambda _, cotangent: (cotangent,))
    return wrapped


@straight_through
def round_half_even(x: jax.Array) -> jax.Array:
    """Rounds to the nearest integer, ties to the even one, with the identity as gradient.

    Forward: ``y = round(x)``; 0.5 -> 0, 1.5 -> 2, -0.5 -> 0.
    Backward: ``dx = dy``.

    Args:
      x: array of any shape, floating point.

    Returns:
      Array of the shape and dtype of ``x``.

    Reference: straight-through estimator, Bengio et al. 2013 (arXiv 1308.3432), section 4.
    """
    return jnp.round(x)


@straight_through
def round_half_away(x: jax.Array) -> jax.Array:
    """Rounds to the nearest integer, ties away from zero, with the identity as gradient.

    Forward: ``y = sign(x) * floor(|x| + 1/2)``; 0.5 -> 1, -0.5 -> -1, 0 -> 0.
    Backward: ``dx = dy``.

    Args:
      x: array of any shape, floating point.

    Returns:
      Array of the shape and dtype of ``x``.

    Reference: release: Luadoo/ASBQ: quantization/q_funcs.py (1-bit rule).
    """
    return jnp.sign(x) * jnp.floor(jnp.abs(x) + 0.5)


@straight_through
def sign_positive_zero(x: jax.Array) -> jax.Array:
    """Sign with +1 at zero, with the identity as gradient (no clipping at \\|x\\| > 1).

    Forward: ``y = +1 if x >= 0 else -1``; 0 and -0 give +1.
    Backward: ``dx = dy``.

    Args:
      x: array of any shape, floating point.

    Returns:
      Array of the shape and dtype of ``x``, values -1 and +1.

    Reference: DoReFa-Net (arXiv 1606.06160), equation 7, with a unit scale.
    """
    return jnp.where(x >= 0, 1.0, -1.0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def clip(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clips to [low, high] and blocks the gradient outside the open interval.

    Forward: ``y = min(max(x, low), high)``.
    Backward: ``dx = dy`` where ``low < x < high``, else 0 (also at ``low`` and ``high`` exactly).

    Args:
      x: array of any shape, floating point.
      low: lower bound.
      high: upper bound.

    Returns:
      Array of the shape and dtype of ``x``, values in [low, high].

    Reference: DoReFa-Net (arXiv 1606.06160), section 2.5.
    """
    return jnp.clip(x, low, high)


def _clip_backward(low: float, high: float, x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((x > low) & (x < high), cotangent, 0.0).astype(cotangent.dtype),)


clip.defvjp(lambda x, low, high: (clip(x, low, high), x), _clip_backward)


def clip_unit(x: jax.Array) -> jax.Array:
    """``clip`` to [0, 1]; the gradient passes where ``0 < x < 1``."""
    return clip(x, 0.0, 1.0)


def relu6(x: jax.Array) -> jax.Array:
    """``clip`` to [0, 6]; the gradient passes where ``0 < x < 6``.

    Reference: Krizhevsky, "Convolutional Deep Belief Networks on CIFAR-10", 2010.
    """
    return clip(x, 0.0, 6.0)
