"""Table of the objectives (loss terms), and the one function that builds them from a ``Spec``."""

from bnn_jax.objectives.base import Batch, Objective, Outputs
from bnn_jax.objectives.classification import CrossEntropy, SquaredHinge
from bnn_jax.objectives.distill import Distillation
from bnn_jax.objectives.self_distill import Cluster, FeatureSwap, LabelBank
from bnn_jax.stages import Spec

OBJECTIVES: dict[str, type[Objective]] = {
    CrossEntropy.name: CrossEntropy,
    SquaredHinge.name: SquaredHinge,
    Distillation.name: Distillation,
    FeatureSwap.name: FeatureSwap,
    LabelBank.name: LabelBank,
    Cluster.name: Cluster,
}


def build(spec: Spec) -> Objective:
    """Builds the objective a ``Spec`` names.

    Raises:
      ValueError: the name is not in the table or an option does not fit.
    """
    if spec.name not in OBJECTIVES:
        raise ValueError(f"objective {spec.name!r}: accepted are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[spec.name](**spec.kwargs)


__all__ = ["OBJECTIVES", "Batch", "Objective", "Outputs", "build"]
