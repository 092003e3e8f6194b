"""Loss terms on the labels."""

import dataclasses

import jax
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
