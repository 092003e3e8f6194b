"""A categorical choice for every weight: K candidate values, and a score (logit) of each.

Scores carry the candidates in their FIRST axis, (K, ...): every operation below is then elementwise over whole tensors,
and no axis of length K stands innermost. The candidates are a tuple of Python numbers in a fixed order.

The gradients are written by hand. Their only residual is the score tensor, which is alive as a parameter anyway;
differentiating through one-hot vectors keeps several tensors of its size (``benchmarks/memory.py`` compares).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Values = tuple[float, ...]


def hard_choice(scores: jax.Array, values: Values, temperature: jax.Array | float) -> jax.Array:
    """The candidate of the highest score, with the gradient of the tempered expectation.

    Forward: ``w = values[argmax_k scores_k]``, the earlier candidate at ties; exactly a candidate, whatever the
      temperature.
    Backward: ``dscores_k = dw / T * p_k * (values_k - sum_j p_j values_j)`` with ``p = softmax(scores / T)``; the sum
      over k is 0. The temperature gets no gradient.

    Args:
      scores: (K, ...), floating point.
      values: K candidates.
      temperature: T > 0, scalar; may be traced.

    Returns:
      (...), in the type of ``scores``.

    Reference: release: qinglu0330/DNN-weight-search: core/categorical.py.
    """
    return _choice(scores, values, "hard", temperature)


def soft_choice(scores: jax.Array, values: Values, temperature: jax.Array | float) -> jax.Array:
    """The expectation of the candidates.

    Forward: ``w = sum_k p_k values_k`` with ``p = softmax(scores / T)``.
    Backward: its true gradient, the same as that of ``hard_choice``.

    Args:
      scores: (K, ...), floating point.
      values: K candidates.
      temperature: T > 0, scalar; may be traced.

    Returns:
      (...), in the type of ``scores``.

    Reference: release: qinglu0330/DNN-weight-search: core/categorical.py (option --soft); SLB, Yang et al. 2020
      (arXiv 2009.08695).
    """
    return _choice(scores, values, "soft", temperature)


def chosen_index(scores: jax.Array) -> jax.Array:
    """Position of the highest score, the earlier one at ties: (K, ...) -> (...), int32.

    Args:
      scores: (K, ...).
    """
    return jnp.argmax(scores, axis=0).astype(jnp.int32)


def probabilities(scores: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """``softmax(scores / T)`` over the first axis.

    Args:
      scores: (K, ...).
      temperature: T > 0, scalar.
    """
    exponentials, total = _unnormalized(scores, temperature)
    return exponentials / total[None]


def with_noise(logits: jax.Array, gumbel: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Scores of noisy logits, ``logits + factor * gumbel``: at factor 1 the highest is a sample of their softmax.

    Args:
      logits: (K, ...).
      gumbel: (K, ...), standard Gumbel noise, ``-log(E)`` with E exponential of rate 1.
      factor: scalar, 0 or more.

    Reference: Jang et al. 2017 (arXiv 1611.01144), equation 1; release: its configs all have factor 0.
    """
    return logits + factor * gumbel


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _choice(scores: jax.Array, values: Values, mode: str, temperature: jax.Array | float) -> Any:
    if mode == "soft":
        return _expectation(*_unnormalized(scores, temperature), values)
    best, value = scores[0], jnp.full(scores.shape[1:], values[0], scores.dtype)
    for score, candidate in zip(scores[1:], values[1:], strict=True):
        better = score > best
        best, value = jnp.where(better, score, best), jnp.where(better, candidate, value)
    return value


def _forward(scores: jax.Array, values: Values, mode: str, temperature: jax.Array | float) -> tuple[Any, tuple]:
    return _choice(scores, values, mode, temperature), (scores, jnp.asarray(temperature))


def _backward(values: Values, mode: str, residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradient of the expectation. Its form decides what XLA keeps: two tensors without the candidate axis."""
    scores, temperature = residuals
    exponentials, total = _unnormalized(scores, temperature)
    mean = _expectation(exponentials, total, values)
    factor = cotangent / jnp.asarray(temperature, scores.dtype) / total
    candidates = jnp.asarray(values, scores.dtype).reshape((-1,) + (1,) * cotangent.ndim)
    return factor[None] * exponentials * (candidates - mean[None]), jnp.zeros_like(temperature)


_choice.defvjp(_forward, _backward)


def _unnormalized(scores: jax.Array, temperature: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """``exp((scores - max) / T)`` (K, ...), and its sum over the candidates (...)."""
    highest = functools.reduce(jnp.maximum, list(scores))
    exponentials = jnp.exp((scores - highest[None]) * (1 / jnp.asarray(temperature, scores.dtype)))
    return exponentials, _sum(list(exponentials))


def _expectation(exponentials: jax.Array, total: jax.Array, values: Values) -> jax.Array:
    return _sum([value * exponential for value, exponential in zip(values, exponentials, strict=True)]) / total


def _sum(terms: list[jax.Array]) -> jax.Array:
    """Sum over the candidates. As K additions, not as a reduction: XLA:CPU turns those into vector code."""
    return functools.reduce(jnp.add, terms)


CHOICES: dict[str, Callable[[jax.Array, Values, jax.Array | float], jax.Array]] = {
    "hard": hard_choice,
    "soft": soft_choice,
}
