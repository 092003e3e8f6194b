"""Weights chosen, one by one, from a short list of values (Weight Search)."""

import fractions
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.knobs import NOISE, TEMPERATURE, Knob
from bnn_jax.ops import categorical
from bnn_jax.quantizers.base import Cost, Encoded, Initializer, QuantContext, Shape, WeightQuantizer, plain_cost

# The published lists, in their order: of two candidates with equal logits the earlier one is chosen.
VALUE_SETS: dict[str, tuple[float, ...]] = {
    "1b": (-1.0, 1.0),
    "po2-2b": (-1.0, -0.5, 0.5, 1.0),
    "po2-3b": (-0.25, -0.5, -1.0, -2.0, 2.0, 1.0, 0.5, 0.25),
    "po2-4b": tuple(-(2.0**e) for e in range(-4, 4)) + tuple(2.0**e for e in range(3, -5, -1)),
    "int-2b": tuple(map(float, range(-2, 2))),
    "int-3b": tuple(map(float, range(-4, 4))),
    "int-4b": tuple(map(float, range(-8, 8))),
}

LARGEST_CODE = 256  # the largest integer up to which bfloat16 holds every integer
INITIAL_NOISE = 1e-5


def candidates_of(values: Any) -> tuple[float, ...]:
    """The candidate values a name or a list stands for.

    Args:
      values: key of ``VALUE_SETS``, or a sequence of at least two different finite numbers.

    Raises:
      ValueError: it is neither.
    """
    accepted = f"accepted are {', '.join(VALUE_SETS)}, or a list of two or more different numbers"
    if isinstance(values, str):
        if values not in VALUE_SETS:
            raise ValueError(f"values={values!r}: {accepted}")
        return VALUE_SETS[values]
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"values={values!r}: {accepted}") from None
    # In float32, in which they are used, they have to be finite and different too.
    representable = all(abs(value) <= float(np.finfo(np.float32).max) for value in found)
    if not representable or len(set(map(np.float32, found))) < max(len(found), 2):
        raise ValueError(f"values={values!r}: {accepted}")
    return found


class CategoricalWeight(WeightQuantizer):
    """Every weight is one of K values; K logits for each say which.

    Forward: ``w = values[argmax_k s_k]`` (mode 'hard', and every evaluation), or in training with mode 'soft'
      ``w = sum_k p_k values_k``, where ``s = logits + r * g`` and ``p = softmax(s / T)``. T and r are the knobs
      ``temperature`` and ``noise``, g is standard Gumbel noise from the random stream 'quant'; without the knob
      ``noise``, and in evaluation, s are the logits and nothing is drawn. Evaluation depends neither on T nor on r.
    Backward: in both modes ``dlogits_k = dw / T * p_k * (values_k - sum_j p_j values_j)``.

    The logits are the layer's ``kernel``, with the candidate axis in front: (K, kh, kw, I, O). They start at ln(1/K)
    with noise of +-5e-6, so that every weight starts at a random value (``start='random'``), or exactly there, so that
    every weight starts at the first one (``start='even'``).

    With ``base_levels`` the chosen value is multiplied by a fixed weight, kept in ``quant_state/.../base`` (ones until
    a stage puts the weights of another network there): a further bit for weights that have been found already.

    Attributes:
      values: key of ``VALUE_SETS``, or K different numbers.
      mode: 'hard' or 'soft', in training.
      start: initial logits, 'random' or 'even'.
      base_levels: the values the fixed weights take; empty: there are none.

    Reference: release: qinglu0330/DNN-weight-search: core/categorical.py, core/module.py ("by value"; with base_levels
      "by bit"). Its noise factor is 0 in all configs.
    """

    values: str | tuple[float, ...] = "po2-2b"
    mode: Literal["hard", "soft"] = "hard"
    start: Literal["random", "even"] = "random"
    base_levels: tuple[float, ...] = ()

    def __post_init__(self):
        candidates_of(self.values)
        for name, accepted in (("mode", ("hard", "soft")), ("start", ("random", "even"))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"categorical quantizer: {name}={getattr(self, name)!r}: accepted are {accepted}")
        super().__post_init__()

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return (TEMPERATURE, NOISE)

    @property
    def candidates(self) -> tuple[float, ...]:
        """The K values in their order."""
        return candidates_of(self.values)

    @property
    def weight_levels(self) -> tuple[float, ...]:
        """Every value a weight can take, increasing."""
        return tuple(sorted({value * base for value in self.candidates for base in self.base_levels or (1.0,)}))

    def cost(self, kernel_shape: Shape) -> Cost:
        return plain_cost(kernel_shape, math.log2(len(self.weight_levels)))

    def latent_shape(self, kernel_shape: Shape) -> Shape:
        return (len(self.candidates), *kernel_shape)

    def latent_init(self, kernel_init: Initializer) -> Initializer:
        return functools.partial(initial_logits, noise=INITIAL_NOISE if self.start == "random" else 0.0)

    def base(self, latent: jax.Array) -> jax.Array | None:
        """The fixed weights (kh, kw, I, O), or None where there are none."""
        if not self.base_levels:
            return None
        if not self.has_variable("quant_state", "base"):
            self.put_variable("quant_state", "base", jnp.ones(latent.shape[1:], latent.dtype))
        return self.get_variable("quant_state", "base")

    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        scores = latent
        if ctx.train and NOISE.name in ctx.knobs:
            gumbel = jax.random.gumbel(self.make_rng("quant"), latent.shape, latent.dtype)
            scores = categorical.with_noise(latent, gumbel, ctx.knob(NOISE))
        mode = self.mode if ctx.train else "hard"
        return self.choose(scores, mode=mode, temperature=ctx.knob(TEMPERATURE))

    def choose(
        self, scores: jax.Array, *, mode: Literal["hard", "soft"] = "hard", temperature: jax.Array | float = 1.0
    ) -> jax.Array:
        """The weights (kh, kw, I, O) of scores (K, kh, kw, I, O)."""
        chosen = categorical.CHOICES[mode](scores, self.candidates, temperature)
        base = self.base(scores)
        return chosen if base is None else chosen * base

    def real_kernel(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        raise ValueError("categorical quantizer: its weights have no real-valued view; feature_swap cannot be used")

    def code_scale(self, latent: jax.Array, ctx: QuantContext) -> jax.Array | None:
        if self.mode == "soft":
            return None
        scale = common_divisor(self.weight_levels)
        return None if scale is None else jnp.asarray(scale, latent.dtype)

    def encode(self, latent: jax.Array, ctx: QuantContext) -> Encoded:
        levels = jnp.asarray(self.weight_levels, jnp.float32)
        indices = jnp.searchsorted(levels, self.choose(latent))
        dtype = jnp.uint8 if levels.size <= 256 else jnp.uint16
        return Encoded(indices=indices.astype(dtype), levels=levels, scale=jnp.ones(()))


def initial_logits(key: jax.Array, shape: Shape, dtype: Any = jnp.float32, *, noise: float = INITIAL_NOISE) -> Any:
    """Logits ``ln(1/K) + noise * (U - 1/2)``, U uniform on [0, 1): (K, ...).

    Args:
      key: random key.
      shape: (K, ...).
      dtype: floating-point type.
      noise: width of the interval; 0 makes all logits equal and draws nothing.

    Reference: release: qinglu0330/DNN-weight-search: core/module.py.
    """
    even = jnp.full(shape, math.log(1 / shape[0]), dtype)
    return even if noise == 0 else even + noise * (jax.random.uniform(key, shape, dtype) - 0.5)


def common_divisor(levels: tuple[float, ...]) -> float | None:
    """The largest number whose integer multiples, at most 256 in magnitude, are the levels; None if there is none."""
    exact = [fractions.Fraction(level) for level in levels]
    denominator = math.lcm(*(level.denominator for level in exact))
    divisor = fractions.Fraction(math.gcd(*(int(level * denominator) for level in exact)), denominator)
    return float(divisor) if max(map(abs, exact)) <= LARGEST_CODE * divisor else None
