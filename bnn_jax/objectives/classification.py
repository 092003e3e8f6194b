"""Loss terms on the labels."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from bnn_jax.objectives.base import Batch, Objective, Outputs, masked_mean
from bnn_jax.quantizers.base import QuantContext


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy with the true labels, which may be smoothed, and are mixed where the images are.

    Forward: ``mean_n (logsumexp(logits_n) - logits_n . q_n)`` over the valid rows; ``q = (1 - s) p + s / K``, p the
      labels as probabilities (``Batch.label_probabilities``), K classes, s the smoothing.
    Backward: ordinary differentiation, ``(softmax(logits) - q) / N``.

    Attributes:
      weight: factor on the term.
      label_smoothing: s, 0 <= s < 1.

    Raises:
      ValueError: a smoothing outside of its range.

    Reference: smoothing: Szegedy et al. 2016 (arXiv 1512.00567), section 7.
    """

    label_smoothing: float = 0.0

    name = "cross_entropy"

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"cross_entropy: label_smoothing={self.label_smoothing!r}: accepted is 0 <= value < 1")

    def __call__(self, outputs: Outputs, batch: Batch, state: dict, ctx: QuantContext) -> jax.Array:
        logits = outputs.logits
        if batch.share is None and not self.label_smoothing:
            rows = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        else:
            targets = optax.smooth_labels(batch.label_probabilities(logits.shape[-1]), self.label_smoothing)
            rows = optax.softmax_cross_entropy(logits, targets)
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
