"""Binary quantizers of IR-Net, and the plain sign."""

import jax
import jax.numpy as jnp

from bnn_jax.knobs import ERROR_DECAY_K, ERROR_DECAY_T, Knob
from bnn_jax.ops import balance, ste
from bnn_jax.quantizers.base import (
    ActQuantizer,
    Cost,
    Encoded,
    QuantContext,
    Shape,
    WeightQuantizer,
    encode_integers,
    plain_cost,
)

# Of the gradient alone: the forward pass does not depend on them.
GRADIENT_KNOBS = (ERROR_DECAY_K, ERROR_DECAY_T)


def error_decay_sign(x: jax.Array, ctx: QuantContext) -> jax.Array:
    """``ops.ste.error_decay_sign`` with k and t from the knobs."""
    return ste.error_decay_sign(x, *map(ctx.knob, GRADIENT_KNOBS))


class IrNetWeight(WeightQuantizer):
    """Balanced binary weights with a power-of-two scale per filter.

    Forward: ``w2 = standardize(w)``; ``Q = 2**round(log2(mean |w2|)) * sign(w2)`` per output filter, sign(0) = 0.
    Backward: the error decay estimator at w2, times the scale, then through mean and standard deviation.

    Attributes:
      bits: 1.

    Reference: IR-Net, Qin et al. 2020 (arXiv 1909.10788), section 3; release: htqin/IR-Net.
    """

    bits: float = 1.0

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return GRADIENT_KNOBS

    def cost(self, kernel_shape: Shape) -> Cost:
        return plain_cost(kernel_shape, self.bits, scales=kernel_shape[-1])

    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        standardized = balance.standardize(latent)
        return _filter_scale(standardized) * error_decay_sign(standardized, ctx)

    def real_kernel(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return balance.standardize(latent)

    def code_scale(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return _filter_scale(balance.standardize(latent))

    def encode(self, latent: jax.Array, ctx: QuantContext) -> Encoded:
        return encode_integers(jnp.sign(balance.standardize(latent)), self.code_scale(latent, ctx), -1, 1)


def _filter_scale(standardized: jax.Array) -> jax.Array:
    """The power-of-two scale of every output filter, with as many axes as the kernel: (1, ..., 1, O)."""
    return jnp.expand_dims(balance.power_of_two_scale(standardized), tuple(range(standardized.ndim - 1)))


class SignWeight(WeightQuantizer):
    """Binary weights without scale.

    Forward: ``Q = sign(w)``, sign(0) = 0.
    Backward: ``dw = dQ``, without clipping.

    Attributes:
      bits: 1.

    Reference: release: Wzixin/SKD-BNN, MNIST (binary linear layers).
    """

    bits: float = 1.0

    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return ste.sign(latent)

    def code_scale(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return jnp.ones(())

    def encode(self, latent: jax.Array, ctx: QuantContext) -> Encoded:
        return encode_integers(jnp.sign(latent), jnp.ones(()), -1, 1)


class SignActBase(ActQuantizer):
    """What activation quantizers to -1 and +1 share."""

    bits: float = 1.0

    def levels(self, ctx: QuantContext) -> jax.Array:
        return jnp.array([-1.0, 0.0, 1.0])

    def code_scale(self, ctx: QuantContext) -> float:
        return 1.0


class IrNetAct(SignActBase):
    """Binary activations with the error decay estimator.

    Forward: ``q = sign(x)``, sign(0) = 0.
    Backward: ``dx = dq * k * t * (1 - tanh(t x)**2)`` with k and t from the knobs.

    Attributes:
      bits: 1.

    Reference: IR-Net, Qin et al. 2020 (arXiv 1909.10788), equations 12 to 14.
    """

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return GRADIENT_KNOBS

    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        return error_decay_sign(x, ctx)


class SignAct(SignActBase):
    """Binary activations with the identity as gradient.

    Forward: ``q = sign(x)``, sign(0) = 0.
    Backward: ``dx = dq``, without clipping.

    Attributes:
      bits: 1.

    Reference: release: Wzixin/SKD-BNN, MNIST (binary linear layers).
    """

    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        return ste.sign(x)
