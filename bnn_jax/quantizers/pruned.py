"""Structured pruning with a fixed mask, around any weight quantizer whose latent has the kernel's shape."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from bnn_jax.knobs import Knob
from bnn_jax.ops import pruning
from bnn_jax.quantizers.base import Cost, Encoded, Initializer, QuantContext, Shape, WeightQuantizer

PATTERNS: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "filter": pruning.filter_mask,
    "row_block": pruning.row_block_mask,
}


class Pruned(WeightQuantizer):
    """Multiplies the weights by a fixed 0/1 mask, before or after the inner quantizer.

    Forward: ``apply_mask='before'``: ``Q(mask * w)`` (a quantizer without a zero level turns masked weights into +M/n);
      ``apply_mask='after'``: ``mask * Q(w)`` (masked weights are 0, statistics see all weights).
    Backward: masked weights get no gradient: ``dw = mask * (...)``.

    The mask is made from the kernel present when the state ``quant_state/.../mask`` is created and never changes in a
    run.

    Attributes:
      inner: factory of the quantizer inside.
      amount: share of filters or blocks that are masked, 0 to 1.
      pattern: 'filter' (whole output filters, least L2 norm) or 'row_block' (1x2 blocks, least L1 norm).
      apply_mask: 'before' or 'after' the inner quantizer.

    Reference: ASBQ, coarse-grained pruning; release: Luadoo/ASBQ: quantization/resnet_quant.py masks before.
    """

    inner: Callable[..., WeightQuantizer] = WeightQuantizer
    amount: float = 0.05
    pattern: Literal["filter", "row_block"] = "filter"
    apply_mask: Literal["before", "after"] = "before"

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"pruned quantizer: pattern={self.pattern!r}: accepted are {', '.join(PATTERNS)}")
        if self.apply_mask not in ("before", "after"):
            raise ValueError(f"pruned quantizer: apply_mask={self.apply_mask!r}: accepted are 'before', 'after'")
        if not 0 <= self.amount < 1:
            raise ValueError(f"pruned quantizer: amount={self.amount!r}: accepted is 0 <= amount < 1")
        inner, kernel_shape = self.inner(parent=None), (3, 3, 1, 1)
        if inner.latent_shape(kernel_shape) != kernel_shape:
            kind = type(inner).__name__
            raise ValueError(f"pruned quantizer: inner={kind}: its latent weights are no kernel, so there are no norms")
        super().__post_init__()

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self.inner(parent=None).knobs

    def setup(self):
        self.quantizer = self.inner()

    def cost(self, kernel_shape: Shape) -> Cost:
        return self.inner(parent=None).cost(kernel_shape)

    @property
    def pictures(self) -> frozenset[str]:
        return self.inner(parent=None).pictures

    def latent_init(self, kernel_init: Initializer) -> Initializer:
        return self.quantizer.latent_init(kernel_init)

    def mask(self, latent: jax.Array) -> jax.Array:
        """The stored mask; made from ``latent`` where none is stored yet."""
        if not self.has_variable("quant_state", "mask"):
            mask = PATTERNS[self.pattern](jax.lax.stop_gradient(latent), self.amount)
            self.put_variable("quant_state", "mask", mask)
        return self.get_variable("quant_state", "mask")

    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        mask = self.mask(latent)
        if self.apply_mask == "before":
            return self.quantizer(latent * mask, ctx)
        return self.quantizer(latent, ctx) * mask

    def real_kernel(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        return self.quantizer.real_kernel(latent * self.mask(latent), ctx)

    def code_scale(self, latent: jax.Array, ctx: QuantContext) -> jax.Array | None:
        return self.quantizer.code_scale(latent * self.mask(latent) if self.apply_mask == "before" else latent, ctx)

    def encode(self, latent: jax.Array, ctx: QuantContext) -> Encoded | None:
        mask = self.mask(latent)
        if self.apply_mask == "before":
            return self.quantizer.encode(latent * mask, ctx)
        encoded = self.quantizer.encode(latent, ctx)
        if encoded is None:
            return None
        return _with_zero_level(encoded.per_weight(), mask)


def _with_zero_level(encoded: Encoded, mask: jax.Array) -> Encoded:
    """Adds the level 0 (unless it is one already) and points the masked weights at it."""
    levels = jnp.unique(jnp.append(encoded.levels, 0.0))
    # Levels are looked up, not weights: a program for the few sizes of their list instead of each kernel's shape.
    places = jnp.searchsorted(levels, jnp.append(encoded.levels, 0.0))
    indices = jnp.where(mask != 0, places[encoded.indices], places[-1])
    return encoded.replace(indices=indices.astype(jnp.uint8 if levels.size <= 256 else jnp.uint16), levels=levels)
