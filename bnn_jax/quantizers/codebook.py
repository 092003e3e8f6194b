"""Sub-bit weights: every 3x3 kernel is one of a few binary patterns, a codebook of the layer's own."""

import math

import flax.struct
import jax
import jax.numpy as jnp

from bnn_jax.knobs import REFINE_CODEBOOK, Knob
from bnn_jax.ops import codebook as ops
from bnn_jax.quantizers.base import Cost, Encoded, QuantContext, Shape, WeightQuantizer, encode_integers


@flax.struct.dataclass
class EncodedKernels(Encoded):
    """Weights as look-ups of whole 3x3 kernels.

    Attributes:
      indices: (I, O), unsigned integers, a pattern for each kernel.
      levels: (n, 9) float32, the patterns, in the order of the codebook; one may be there twice, or not be used.
      scale: (1, 1, 1, O) float32.
    """

    def decode(self) -> jax.Array:
        """The quantized kernel (3, 3, I, O)."""
        num_in, num_out = self.indices.shape
        return ops.from_rows(self.levels[self.indices.T.reshape(-1)], (3, 3, num_in, num_out)) * self.scale

    def per_weight(self) -> Encoded:
        """The same as look-ups of single weights, -1 or +1."""
        return encode_integers(self.replace(scale=jnp.ones((1, 1, 1, 1))).decode(), self.scale, -1, 1, step=2)


class CodebookWeight(WeightQuantizer):
    """Binary 3x3 kernels out of a learnable codebook of ``n = 2**tau`` patterns.

    Forward: the patterns M are the signs of the codebook p, or within the dead zone the signs they had before;
      ``Q[..., i, o] = alpha_o * M[j]`` with j the nearest pattern to the latent kernel w[..., i, o] and
      ``alpha_o = mean |w[..., o]|``.
    Backward: ``dw = alpha_o * dQ * [|w| <= 1]``; ``dp_j = sum alpha_o * dQ[..., i, o]`` over the kernels of pattern j
      on steps whose knob 'refine_codebook' is above 0, else 0. No gradient through alpha, the choice of j and M.

    Parameters ``codebook`` (n, 9), at first n different random patterns; state ``memory`` (n, 9), the M of the last
    training step. Duplicates in the codebook are replaced by the projection 'refill_codebooks' of the training step.

    Attributes:
      bits: 1, of a weight beside its scale; stored are tau bits for each kernel of nine weights.
      tau: 1 to 9; 9 has every pattern.
      dead_zone: size below which an entry of the codebook does not change its sign, at least 0.

    Reference: SNN, Wang et al. 2021 (arXiv 2110.09195); release: yikaiw/SNN.
    """

    bits: float = 1.0
    tau: int = 5
    dead_zone: float = 1e-3

    def __post_init__(self):
        if not isinstance(self.tau, int) or not 1 <= self.tau <= ops.POSITIONS:
            raise ValueError(f"codebook quantizer: tau={self.tau!r}: accepted are 1 to 9")
        if not self.dead_zone >= 0:
            raise ValueError(f"codebook quantizer: dead_zone={self.dead_zone!r}: accepted is 0 or more")
        super().__post_init__()

    def setup(self):
        self.codebook = self.param("codebook", _random_codebook, 2**self.tau)
        self.memory = self.variable("quant_state", "memory", lambda: jnp.where(self.codebook > 0, 1.0, -1.0))

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return (REFINE_CODEBOOK,)

    @property
    def stored_bits(self) -> float:
        return self.tau / ops.POSITIONS

    @property
    def pictures(self) -> frozenset[str]:
        return frozenset({"pattern_use", "pattern_motion"})

    def latent_shape(self, kernel_shape: Shape) -> Shape:
        _require_3x3(kernel_shape)
        return kernel_shape

    def patterns(self) -> jax.Array:
        """The patterns (n, 9) kernels are chosen from, -1 and +1."""
        return ops.remember(self.codebook, self.memory.value, self.dead_zone)

    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        _require_3x3(latent.shape)
        patterns = self.patterns()
        binary = ops.assign(ops.to_rows(latent), self.codebook, patterns, ctx.knob(REFINE_CODEBOOK))
        if ctx.train and self.is_mutable_collection("quant_state"):
            self.memory.value = patterns
        return ops.from_rows(binary, latent.shape) * self.code_scale(latent, ctx)

    def code_scale(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return jax.lax.stop_gradient(jnp.mean(jnp.abs(latent), axis=(0, 1, 2), keepdims=True))

    def encode(self, latent: jax.Array, ctx: QuantContext) -> EncodedKernels:
        _require_3x3(latent.shape)
        patterns = self.patterns()
        indices = ops.nearest(ops.to_rows(latent), patterns).reshape(latent.shape[3], latent.shape[2])
        dtype = jnp.uint8 if len(patterns) <= 256 else jnp.uint16
        return EncodedKernels(indices=indices.T.astype(dtype), levels=patterns, scale=self.code_scale(latent, ctx))

    def cost(self, kernel_shape: Shape) -> Cost:
        """What a kernel costs.

        With fewer patterns than output channels every input channel meets each pattern once, and each output channel
        sums up what it is made of: ``I * (9 n + O / 2)`` products with sums, a sum without product counting half. With
        all patterns an index is the pattern itself, and no table is stored.
        """
        (num_in, num_out), patterns = kernel_shape[-2:], 2**self.tau
        shared = num_in * (ops.POSITIONS * patterns + num_out / 2)
        return Cost(
            stored_bits=self.tau / ops.POSITIONS,
            operation_bits=1.0,
            multiply_accumulates=float(math.prod(kernel_shape)) if patterns >= num_out else shared,
            codebook_bits=0 if self.tau == ops.POSITIONS else ops.POSITIONS * patterns,
            scales=num_out,
        )


def _random_codebook(key: jax.Array, count: int) -> jax.Array:
    return ops.all_patterns()[ops.random_patterns(key, count)]


def _require_3x3(shape: Shape) -> None:
    if len(shape) != 4 or shape[:2] != (3, 3):
        raise ValueError(f"codebook quantizer: kernel {'x'.join(map(str, shape))}: accepted are 3x3 convolutions")
