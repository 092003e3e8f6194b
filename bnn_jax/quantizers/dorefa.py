"""DoReFa quantizers of weights and activations, as ASBQ uses them."""

from typing import Literal

import jax
import jax.numpy as jnp

from bnn_jax.ops import uniform
from bnn_jax.quantizers.base import (
    ActQuantizer,
    Cost,
    Encoded,
    QuantContext,
    Shape,
    WeightQuantizer,
    encode_integers,
    plain_cost,
    validate_bits,
)


class DorefaWeight(WeightQuantizer):
    """Weights on a uniform grid with one scale per tensor.

    Forward: 2 to 8 bits: ``ops.uniform.dorefa_weight``, levels ``M*(2i/n - 1)``, without zero. 1 bit with
      ``one_bit='sign'``: ``E*sign(w)``, sign(0) = +1; with ``one_bit='levels'``: integer multiples of E, which is not
      binary.
    Backward: 2 to 8 bits ``dw = dQ * (1 - tanh(w)**2)``; 1 bit ``dw = dQ``.

    Attributes:
      bits: 1 to 8.
      one_bit: rule at 1 bit.

    Reference: DoReFa-Net (arXiv 1606.06160), section 2.3; release: Luadoo/ASBQ: quantization/q_funcs.py.
    """

    one_bit: Literal["sign", "levels"] = "sign"

    def __post_init__(self):
        validate_bits(self.bits, range(1, 9), "dorefa weight quantizer")
        if self.one_bit not in ("sign", "levels"):
            raise ValueError(f"dorefa weight quantizer: one_bit={self.one_bit!r}: accepted are 'sign', 'levels'")
        super().__post_init__()

    def cost(self, kernel_shape: Shape) -> Cost:
        return plain_cost(kernel_shape, self.bits, scales=1)

    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return self.quantize(latent)

    def quantize(self, latent: jax.Array) -> jax.Array:
        """Quantized kernel of the shape of ``latent``; see the class for the formula."""
        if self.bits > 1:
            return uniform.dorefa_weight(latent, int(self.bits))
        if self.one_bit == "sign":
            return uniform.sign_weight(latent)
        return uniform.integer_levels_weight(latent)

    def code_scale(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        if self.bits > 1:
            return uniform.dorefa_weight_range(latent) / (2.0**self.bits - 1)
        return uniform.mean_magnitude(latent)

    def encode(self, latent: jax.Array, ctx: QuantContext) -> Encoded:
        scale = self.code_scale(latent, ctx)
        codes = jnp.round(self.quantize(latent) / jnp.where(scale == 0, 1.0, scale))
        if self.bits > 1 or self.one_bit == "sign":
            n = 2 ** int(self.bits) - 1
            return encode_integers(codes, scale, -n, n, step=2)
        # The number of levels follows from the data: |w|/E is at most the number of weights.
        highest = int(jnp.max(jnp.abs(codes)))
        return encode_integers(codes, scale, -highest, highest)


class DorefaAct(ActQuantizer):
    """Activations on a uniform grid over [0, 1].

    Forward: ``ops.uniform.dorefa_activation``: ``round(clip(x, 0, 1) * n) / n``, n = 2**bits - 1; 0.5 -> 1 at 1 bit.
    Backward: ``dx = dq`` where ``0 < x < 1``, else 0.

    Attributes:
      bits: 1 to 8.

    Reference: DoReFa-Net (arXiv 1606.06160), equations 5 and 11.
    """

    def __post_init__(self):
        validate_bits(self.bits, range(1, 9), "dorefa activation quantizer")
        super().__post_init__()

    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        return uniform.dorefa_activation(x, int(self.bits))

    def levels(self, ctx: QuantContext) -> jax.Array:
        n = 2 ** int(self.bits) - 1
        return jnp.arange(n + 1, dtype=jnp.float32) / n

    def code_scale(self, ctx: QuantContext) -> float:
        return 1.0 / (2 ** int(self.bits) - 1)
