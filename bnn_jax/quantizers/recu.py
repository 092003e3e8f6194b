"""Binary quantizers of ReCU: weights far from 0 are clamped, so that they can change their signs again."""

import jax
import jax.numpy as jnp

from bnn_jax.knobs import CLAMP_QUANTILE, Knob
from bnn_jax.ops import balance, clipping, ste
from bnn_jax.quantizers.base import Encoded, QuantContext, WeightQuantizer, encode_integers
from bnn_jax.quantizers.irnet import SignActBase

# Of standardised weights: that of a Laplace distribution with the scale b = 2, sqrt(2) * b.
STANDARD_DEVIATION = 2 * 2**0.5
EPSILON = 1e-5


class ReCuWeight(WeightQuantizer):
    """Binary weights with a learned scale per filter.

    Forward: ``Q = alpha_o * sign(w_o)``, w standardised per filter to the standard deviation 2 sqrt(2); sign(0) = 0.
    Backward: ``alpha_o * dQ`` for the weights that ``ops.clipping.rectified_clamp`` leaves alone, tau being the knob
      ``clamp_quantile``, else 0; then through mean and standard deviation. ``dalpha_o = sum of dQ * sign(w_o)``.

    The parameter ``scale`` (O,), alpha, starts uniform on [0, 1).

    Attributes:
      bits: 1.

    Reference: ReCU, Xu et al. 2021 (arXiv 2103.12369), section 4; release: z-hXu/ReCU: the learned scale and its start.
    """

    bits: float = 1.0

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return (CLAMP_QUANTILE,)

    def scale(self, latent: jax.Array) -> jax.Array:
        """The scale of every filter, (1, ..., 1, O); drawn where there is none yet."""
        if not self.has_variable("params", "scale"):
            self.put_variable("params", "scale", jax.random.uniform(self.make_rng("params"), latent.shape[-1:]))
        return self.get_variable("params", "scale").reshape((1,) * (latent.ndim - 1) + (-1,))

    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        clamped = clipping.rectified_clamp(self.real_kernel(latent, ctx), ctx.knob(CLAMP_QUANTILE))
        return self.scale(latent) * ste.sign(clamped)

    def real_kernel(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return STANDARD_DEVIATION * balance.standardize(latent)

    def code_scale(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return self.scale(latent)

    def encode(self, latent: jax.Array, ctx: QuantContext) -> Encoded:
        return encode_integers(jnp.sign(balance.standardize(latent)), self.scale(latent), -1, 1)


class ReCuAct(SignActBase):
    """Binary activations with the piecewise polynomial gradient, taken in training at inputs of unit variance.

    Forward: ``q = sign(x)``, sign(0) = 0.
    Backward: in training through ``z = x / sqrt(var(x_n) + 1e-5)``, the unbiased variance of each image's values:
      ``dz = dq * max(0, 2 - 2 |z|)``.

    Attributes:
      bits: 1.

    Reference: Bi-Real Net, Liu et al. 2018 (arXiv 1808.00278), section 3.3; release: z-hXu/ReCU: the variance.
    """

    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        if ctx.train:
            x = x / jnp.sqrt(jnp.var(x, axis=tuple(range(1, x.ndim)), keepdims=True, ddof=1) + EPSILON)
        return ste.approx_sign(x)
