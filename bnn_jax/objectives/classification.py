"""Loss terms on the labels."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from bnn_jax.objectives.base import Batch, Objective, Outputs, masked_mean
from bnn_jax.quantizers.base import QuantContext


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy with the true labels.

    Forward: ``mean_n (logsumexp(logits_n) - logits_n[label_n])`` over the valid rows.
    Backward: ordinary differentiation, ``(softmax(logits) - onehot) / N``.

    Attributes:
      weight: factor on the term.
    """

    name = "cross_entropy"

    def __call__(self, outputs: Outputs, batch: Batch, state: dict, ctx: QuantContext) -> jax.Array:
        rows = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, batch.labels)
        return masked_mean(rows, batch.mask)


@dataclasses.dataclass(frozen=True)
class SquaredHinge(Objective):
    """Squared hinge loss of every output against +1 (true class) or -1.

    Forward: ``mean_n mean_c max(0, 1 - target_nc * logit_nc)**2`` over the valid rows.
    Backward: ordinary differentiation.

    Attributes:
      weight: factor on the term.

    Reference: BinaryNet, Courbariaux et al. 2016 (arXiv 1602.02830), section 2.
    """

    name = "squared_hinge"

    def __call__(self, outputs: Outputs, batch: Batch, state: dict, ctx: QuantContext) -> jax.Array:
        targets = 2 * jax.nn.one_hot(batch.labels, outputs.logits.shape[-1]) - 1
        rows = jnp.mean(jnp.square(jnp.maximum(0.0, 1 - targets * outputs.logits)), axis=-1)
        return masked_mean(rows, batch.mask)
