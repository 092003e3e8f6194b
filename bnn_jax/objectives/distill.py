"""Loss terms towards the logits of a teacher."""

import dataclasses

import jax
import jax.numpy as jnp

from bnn_jax.objectives.base import Batch, Objective, Outputs, masked_mean
from bnn_jax.quantizers.base import QuantContext

REDUCTIONS = ("mean", "batchmean")
MEASURES = ("divergence", "cross_entropy")


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
    """How far the softened student is from the softened teacher.

    Forward: ``measure='divergence'``: ``KD = mean_n sum_c p_t (log p_t - log p_s)`` with ``p = softmax(logits /
      temperature)``; ``measure='cross_entropy'``: ``mean_n sum_c -p_t log p_s``, which is the entropy of the teacher
      more and has the same gradient. With ``reduction='mean'`` the sum over classes is divided by the number of classes
      K as well. The loss of ASBQ multiplies it by ``2 T**2`` (or ``T**2``): that factor belongs into ``weight``.
    Backward: ordinary differentiation into the student; the teacher is a constant.

    Attributes:
      weight: factor on the term.
      temperature: T > 0.
      reduction: 'batchmean' or 'mean'.
      measure: 'divergence' or 'cross_entropy'.

    Raises:
      ValueError: an unknown reduction or measure, or a temperature that is not positive.

    Reference: Hinton et al. 2015 (arXiv 1503.02531); release: Luadoo/ASBQ: KLDivLoss with the element mean, factor 2
      T**2; yikaiw/SNN: cross-entropy, temperature 1.
    """

    temperature: float = 1.0
    reduction: str = "batchmean"
    measure: str = "divergence"

    name = "distillation"
    needs = frozenset({"teacher_logits"})

    def __post_init__(self):
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"distillation: reduction={self.reduction!r}: accepted are {', '.join(REDUCTIONS)}")
        if self.measure not in MEASURES:
            raise ValueError(f"distillation: measure={self.measure!r}: accepted are {', '.join(MEASURES)}")
        if not self.temperature > 0:
            raise ValueError(f"distillation: temperature={self.temperature!r}: accepted are positive numbers")

    def __call__(self, outputs: Outputs, batch: Batch, state: dict, ctx: QuantContext) -> jax.Array:
        assert outputs.teacher_logits is not None  # ``needs`` asks the step for them
        distance = divergence if self.measure == "divergence" else soft_cross_entropy
        rows = distance(outputs.logits, outputs.teacher_logits, self.temperature)
        mean = masked_mean(rows, batch.mask)
        return mean / outputs.logits.shape[-1] if self.reduction == "mean" else mean


def divergence(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Per-row divergence (N,) of two sets of logits (N, K) at a temperature; the teacher is a constant."""
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    student = jax.nn.log_softmax(student_logits / temperature)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def soft_cross_entropy(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Per-row cross-entropy (N,) with a teacher's probabilities as labels; the teacher is a constant."""
    labels = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    return -jnp.sum(labels * jax.nn.log_softmax(student_logits / temperature), axis=-1)
