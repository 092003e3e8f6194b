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


@jax.custom_vjp
def error_decay_sign(x: jax.Array, k: jax.Array | float, t: jax.Array | float) -> jax.Array:
    """Sign whose gradient narrows during training (error decay estimator).

    Forward: ``y = sign(x)`` with ``sign(0) = 0``.
    Backward: ``dx = dy * k * t * (1 - tanh(t * x)**2)``; k and t get no gradient. There is no clipping at ``|x| > 1``.

    Args:
      x: array of any shape, floating point.
      k: scalar > 0, height of the gradient over t.
      t: scalar > 0, inverse width of the gradient.

    Returns:
      Array of the shape and dtype of ``x``, values -1, 0 (only at 0) and 1.

    Reference: IR-Net, Qin et al. 2020 (arXiv 1909.10788), equations 12 to 14; release: htqin/IR-Net.
    """
    return jnp.sign(x)


def _error_decay_backward(residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, k, t = residuals
    slope = k * t * (1 - jnp.square(jnp.tanh(t * x)))
    return (cotangent * slope).astype(cotangent.dtype), jnp.zeros_like(k), jnp.zeros_like(t)


def _error_decay_forward(x: jax.Array, k: jax.Array | float, t: jax.Array | float) -> tuple[jax.Array, tuple]:
    return jnp.sign(x), (x, jnp.asarray(k, x.dtype), jnp.asarray(t, x.dtype))


error_decay_sign.defvjp(_error_decay_forward, _error_decay_backward)


@straight_through
def sign(x: jax.Array) -> jax.Array:
    """Sign with 0 at zero, with the identity as gradient (no clipping at \\|x\\| > 1).

    Forward: ``y = sign(x)``; 0 gives 0.
    Backward: ``dx = dy``.

    Args:
      x: array of any shape, floating point.

    Returns:
      Array of the shape and dtype of ``x``, values -1, 0 and 1.

    Reference: straight-through estimator, Bengio et al. 2013 (arXiv 1308.3432), section 4.
    """
    return jnp.sign(x)


def hard_tanh(x: jax.Array) -> jax.Array:
    """``clip`` to [-1, 1]; the gradient passes where ``-1 < x < 1``.

    Reference: Collobert 2004, "Large scale machine learning".
    """
    return clip(x, -1.0, 1.0)


@jax.custom_vjp
def approx_sign(x: jax.Array) -> jax.Array:
    """Sign whose gradient is that of a piecewise quadratic curve through -1, 0 and 1.

    Forward: ``y = sign(x)`` with ``sign(0) = 0``.
    Backward: ``dx = dy * max(0, 2 - 2 |x|)``: 2 at 0, falling to 0 at -1 and 1, 0 beyond.

    Args:
      x: array of any shape, floating point.

    Returns:
      Array of the shape and dtype of ``x``, values -1, 0 (only at 0) and 1.

    Reference: Bi-Real Net, Liu et al. 2018 (arXiv 1808.00278), section 3.3; release: liuzechun/ReActNet: resnet/.
    """
    return jnp.sign(x)


def _approx_sign_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return ((cotangent * jnp.maximum(0.0, 2 - 2 * jnp.abs(x))).astype(cotangent.dtype),)


approx_sign.defvjp(lambda x: (jnp.sign(x), x), _approx_sign_backward)
