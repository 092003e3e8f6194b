"""Batch normalisation with the running-variance rule of the published networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnn_jax.quantizers.base import QuantContext, chosen_branch


class BatchNorm(nn.Module):
    """Normalises every channel by batch statistics in training and by running statistics in evaluation.

    Forward (training): ``y = (x - mean) / sqrt(var + epsilon) * scale + bias`` with the biased batch variance;
      ``running = momentum * running + (1 - momentum) * batch``, where the running variance takes the UNBIASED batch
      variance ``var * n / (n - 1)`` (flax's own layer stores the biased one). Rows that ``ctx.mask`` marks as padding
      count neither in the statistics nor in n. The real stream (``ctx.stream == 'real'``) never changes the running
      statistics.
    Backward: ordinary differentiation, through the batch statistics too.

    With several branches everything is (branches, C), and a pass uses row ``ctx.choice[index]``, row 0 without a
    choice: in training only that row's running statistics move, and the gradients of the others are zeros.

    Attributes:
      branches: number of branches; 1: there is no branch axis.
      index: place of this layer in ``ctx.choice``.
      momentum: share of the old running value that is kept (0.9 is PyTorch's ``momentum=0.1``).
      epsilon: added to the variance.

    Reference: Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1; branches: BASQ, Kim et al. 2022 (ECCV), section
      3.2, release: HanByulKim/BASQ: mbv2_supernet.py.
    """

    branches: int = 1
    index: int = 0
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """Normalised ``x`` (N, ..., C), float32."""
        shape = (x.shape[-1],) if self.branches == 1 else (self.branches, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        row = ... if self.branches == 1 else chosen_branch(ctx, self.index)
        if ctx.train:
            mean, var, count = batch_moments(x, ctx.mask)
            if not self.is_initializing() and ctx.stream == "quant":
                for variable, value in ((running_mean, mean), (running_var, unbiased(var, count))):
                    old = jnp.asarray(variable.value)
                    variable.value = old.at[row].set(running(old[row], value, self.momentum))
        else:
            mean, var = (jnp.asarray(variable.value)[row] for variable in (running_mean, running_var))
        return normalise(x, mean, var, jnp.asarray(scale)[row], jnp.asarray(bias)[row], epsilon=self.epsilon)


def running(old: jax.Array, batch: jax.Array, momentum: float) -> jax.Array:
    """Running value after a batch."""
    return momentum * old + (1 - momentum) * batch


def unbiased(var: jax.Array, count: jax.Array) -> jax.Array:
    """Unbiased variance from the biased one of ``count`` values."""
    return var * (count / jnp.maximum(count - 1, 1))


def normalise(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float
) -> jax.Array:
    """``(x - mean) / sqrt(var + epsilon) * scale + bias``, channel by channel; the four are (C,)."""
    mean, var, scale, bias = (per_channel(v, x) for v in (mean, var, scale, bias))
    # One factor and one summand, as PyTorch computes it on a CPU: where a value equals its channel's mean, the next
    # layer binarises the rounding of this line, and (x - mean) would often be an exact 0 instead.
    factor = jax.lax.rsqrt(var + epsilon) * scale
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
