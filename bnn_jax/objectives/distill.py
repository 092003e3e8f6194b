"""Loss terms towards the logits of a teacher."""

import dataclasses

import jax
import jax.numpy as jnp

from bnn_jax.objectives.base import Batch, Objective, Outputs, masked_mean
from bnn_jax.quantizers.base import QuantContext

REDUCTIONS = ("mean", "batchmean")


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
    """Kullback-Leibler divergence from the softened student to the softened teacher.

    Forward: ``KD = mean_n sum_c p_t (log p_t - log p_s)`` with ``p = softmax(logits / temperature)``; with
      ``reduction='mean'`` the sum over classes is divided by the number of classes K as well. The published loss
      multiplies it by ``2 T**2`` (or ``T**2``): that factor belongs into ``weight``.
    Backward: ordinary differentiation into the student; the teacher is a constant.

    Attributes:
      weight: factor on the term.
      temperature: T > 0.
      reduction: 'batchmean' or 'mean'.

    Raises:
      ValueError: an unknown reduction or a temperature that is not positive.

    Reference: Hinton et al. 2015 (arXiv 1503.02531); release: Luadoo/ASBQ: KLDivLoss with the element mean, factor 2
      T**2.
    """

    temperature: float = 1.0
    reduction: str = "batchmean"

    name = "distillation"
    needs = frozenset({"teacher_logits"})

    def __post_init__(self):
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"distillation: reduction={self.reduction!r}: accepted are {', '.join(REDUCTIONS)}")
        if not self.temperature > 0:
            raise ValueError(f"distillation: temperature={self.temperature!r}: accepted are positive numbers")

    def __call__(self, outputs: Outputs, batch: Batch, state: dict, ctx: QuantContext) -> jax.Array:
        assert outputs.teacher_logits is not None  # ``needs`` asks the step for them
        rows = divergence(outputs.logits, outputs.teacher_logits, self.temperature)
        mean = masked_mean(rows, batch.mask)
        return mean / outputs.logits.shape[-1] if self.reduction == "mean" else mean


def divergence(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Per-row divergence (N,) of two sets of logits (N, K) at a temperature; the teacher is a constant."""
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    student = jax.nn.log_softmax(student_logits / temperature)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
