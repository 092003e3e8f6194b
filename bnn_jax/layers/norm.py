"""Batch normalisation with the running-variance rule of the published networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnn_jax.quantizers.base import QuantContext


class BatchNorm(nn.Module):
    """Normalises every channel by batch statistics in training and by running statistics in evaluation.

    Forward (training): ``y = (x - mean) / sqrt(var + epsilon) * scale + bias`` with the biased batch variance;
      ``running = momentum * running + (1 - momentum) * batch``, where the running variance takes the UNBIASED batch
      variance ``var * n / (n - 1)`` (flax's own layer stores the biased one). Rows that ``ctx.mask`` marks as padding
      count neither in the statistics nor in n. The real stream (``ctx.stream == 'real'``) never changes the running
      statistics.
    Backward: ordinary differentiation, through the batch statistics too.

    Attributes:
      momentum: share of the old running value that is kept (0.9 is PyTorch's ``momentum=0.1``).
      epsilon: added to the variance.

    Reference: Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """Normalised ``x`` (N, ..., C), float32."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if ctx.train:
            mean, var, count = batch_moments(x, ctx.mask)
            if not self.is_initializing() and ctx.stream == "quant":
                unbiased = var * (count / jnp.maximum(count - 1, 1))
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        mean, var, scale, bias = (per_channel(v, x) for v in (mean, var, scale, bias))
        # One factor and one summand, as PyTorch computes it on a CPU: where a value equals its channel's mean, the next
        # layer binarises the rounding of this line, and (x - mean) would often be an exact 0 instead.
        factor = jax.lax.rsqrt(var + self.epsilon) * scale
        return x * factor + (bias - mean * factor)


def per_channel(values: jax.Array, x: jax.Array) -> jax.Array:
    """(C,) -> (1, ..., 1, C), as many axes as ``x``."""
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


def batch_moments(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, biased variance and number of values per channel, over the valid rows.

    Args:
      x: (N, ..., C).
      mask: (N,) bool, or None for all rows.

    Returns:
      mean (C,), variance (C,), number of values per channel (scalar float32).
    """
    axes = tuple(range(x.ndim - 1))
    per_row = x[0, ..., 0].size
    if mask is None:
        mean = jnp.mean(x, axis=axes)
        return mean, jnp.mean(jnp.square(x - per_channel(mean, x)), axis=axes), jnp.float32(x.shape[0] * per_row)
    weight = mask.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
    count = jnp.maximum(jnp.sum(weight), 1) * per_row
    mean = jnp.sum(x * weight, axis=axes) / count
    return mean, jnp.sum(jnp.square(x - per_channel(mean, x)) * weight, axis=axes) / count, count
