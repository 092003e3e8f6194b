"""Activations with shifts of their own, around the sign of binary networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnn_jax.layers.norm import per_channel


class LearnableBias(nn.Module):
    """Adds a number per channel; in front of a sign it is the sign's threshold ("RSign").

    Forward: ``y = x + bias``, the bias starts at 0.
    Backward: ordinary differentiation.

    Reference: ReActNet, Liu et al. 2020 (arXiv 2003.03488), section 4.2; release: liuzechun/ReActNet.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, ..., C) -> the same shape."""
        return x + per_channel(self.param("bias", nn.initializers.zeros, (x.shape[-1],)), x)


class PRelu(nn.Module):
    """Rectifier with a slope per channel for negative values.

    Forward: ``y = x if x > 0 else slope * x``; the slope starts at 0.25.
    Backward: ``dx = dy * (1 if x > 0 else slope)``, ``dslope = sum(dy * x)`` over the values with ``x <= 0``.

    Reference: He et al. 2015 (arXiv 1502.01852), section 2.1.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, ..., C) -> the same shape."""
        slope = per_channel(self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],)), x)
        return jnp.where(x > 0, x, slope * x)


class RPRelu(nn.Module):
    """A rectifier whose kink can be shifted in both directions.

    Forward: ``y = prelu(x + input_shift) + output_shift``, three numbers per channel.
    Backward: ordinary differentiation.

    Reference: ReActNet, Liu et al. 2020 (arXiv 2003.03488), section 4.2; release: liuzechun/ReActNet.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, ..., C) -> the same shape."""
        x = PRelu(name="prelu")(LearnableBias(name="input_shift")(x))
        return LearnableBias(name="output_shift")(x)
