"""Quantizers with a learned step per channel (LSQ), as BASQ uses them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnn_jax.ops import learned_step as ops
from bnn_jax.quantizers.base import ActQuantizer, Encoded, QuantContext, WeightQuantizer, encode_integers, validate_bits


class LsqWeight(WeightQuantizer):
    """Weights that are small integers times a learned step per output channel.

    Forward: ``round(clip(w/s, -p, p)) * s``, ``p = 2**(bits-1) - 1``: 3 levels at 2 bits (ternary), 7 at 3, 15 at 4.
    Backward: ``ops.learned_step``; the gradient of the steps is scaled by ``1/sqrt(N p)``, N numbers in the kernel.

    The parameter ``step`` (O,) starts as ``2 mean|w_o| / sqrt(p)``; made anew from copied weights where a stage
    recomputes it.

    Attributes:
      bits: 2 to 8.

    Reference: LSQ, Esser et al. 2020 (arXiv 1902.08153); release: HanByulKim/BASQ: mbv2_supernet.py.
    """

    def __post_init__(self):
        validate_bits(self.bits, range(2, 9), "lsq weight quantizer")
        super().__post_init__()

    @property
    def _range(self) -> tuple[int, int]:
        return ops.weight_range(int(self.bits))

    def step(self, latent: jax.Array) -> jax.Array:
        """The steps (O,); made from ``latent`` where there are none yet."""
        if not self.has_variable("params", "step"):
            first = jax.lax.stop_gradient(ops.initial_step(latent, self._range[1]))
            self.put_variable("params", "step", first)
        return self.get_variable("params", "step")

    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        lowest, highest = self._range
        scale = ops.gradient_scale(latent.size, highest)
        return ops.learned_step(latent, self.step(latent), lowest=lowest, highest=highest, scale=scale)

    def code_scale(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return self.step(latent).reshape((1,) * (latent.ndim - 1) + (-1,))

    def encode(self, latent: jax.Array, ctx: QuantContext) -> Encoded:
        lowest, highest = self._range
        codes = ops.codes(latent, self.step(latent), lowest, highest)
        return encode_integers(codes, self.code_scale(latent, ctx), lowest, highest)


class LsqAct(ActQuantizer):
    """Activations that are integers from 0 times a learned step per input channel.

    Forward: ``round(clip(x/s, 0, p)) * s``, ``p = 2**bits - 1``.
    Backward: ``ops.learned_step``; the gradient of the steps is scaled by ``1/sqrt(N p)``, N valid input numbers.

    The parameter ``step`` (C,) starts as ``2 mean|x_c| / sqrt(p)`` over the first batch. The pass that makes it still
    quantizes with a step of 1, so every layer starts from what its predecessors give at step 1, as published.

    Attributes:
      bits: 1 to 8.

    Reference: LSQ, Esser et al. 2020 (arXiv 1902.08153); release: HanByulKim/BASQ: mbv2_supernet.py.
    """

    def __post_init__(self):
        validate_bits(self.bits, range(1, 9), "lsq activation quantizer")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        lowest, highest = ops.activation_range(int(self.bits))
        is_first_pass = not self.has_variable("params", "step")
        step = self.param("step", lambda _: jax.lax.stop_gradient(ops.initial_step(x, highest, mask=ctx.mask)))
        if is_first_pass:
            step = jnp.ones_like(step)
        rows = x.shape[0] if ctx.mask is None else jnp.maximum(jnp.sum(ctx.mask), 1)
        scale = ops.gradient_scale(rows * x[0].size, highest)
        return ops.learned_step(x, step, lowest=lowest, highest=highest, scale=scale)
