"""Metrics of training steps, and their sums over the images of an epoch, which survive a restart with the state."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bnn_jax.objectives.base import Batch, Objective, Outputs

# Metrics that are numbers of images; the others are means over a step's images.
COUNTS = ("count", "correct", "correct5")


def zero_metric_sums(
    objectives: Sequence[Objective], *, with_norms: bool = False, with_top5: bool = False
) -> dict[str, jax.Array]:
    """The epoch's sums at its start; ``non_finite_step`` is -1 until a loss is NaN or infinite."""
    kinds = ("loss", "gradient_norm") if with_norms else ("loss",)
    names = ["count", "correct", "loss", *(f"{kind}/{term.name}" for term in objectives for kind in kinds)]
    if with_top5:
        names.append("correct5")
    sums = {name: jnp.zeros((), jnp.float32) for name in names}
    return {**sums, "non_finite_step": jnp.full((), -1, jnp.int32)}


def step_metrics(
    objectives: Sequence[Objective], terms: dict[str, jax.Array], outputs: Outputs, batch: Batch
) -> dict[str, jax.Array]:
    """Metrics of a step: scalars."""
    rank = label_rank(outputs.logits, batch.labels)
    return {
        "loss": sum((o.weight * terms[o.name] for o in objectives), start=jnp.zeros(())),
        **{f"loss/{name}": value for name, value in terms.items()},
        "count": jnp.sum(batch.mask.astype(jnp.float32)),
        "correct": jnp.sum(((rank < 1) & batch.mask).astype(jnp.float32)),
        "correct5": jnp.sum(((rank < 5) & batch.mask).astype(jnp.float32)),
    }


def label_rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Number of classes that come before an image's label: those of a larger logit, or of the same and a lower index.

    Args:
      logits: (N, K).
      labels: (N,), integers.

    Returns:
      (N,), int32; 0 where the label is what ``argmax`` gives.
    """
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1])[None] < labels[:, None]
    # Written so that NaN, too, comes before the label.
    return jnp.sum(~(logits <= of_label) | ((logits == of_label) & earlier), axis=-1, dtype=jnp.int32)


def add_metrics(sums: dict[str, jax.Array], metrics: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
    """Adds a step's metrics to the epoch's sums; means are weighted by the number of images."""
    weighted = {name: value if name in COUNTS else value * metrics["count"] for name, value in metrics.items()}
    new = {name: sums[name] + value for name, value in weighted.items() if name in sums}
    first = (sums["non_finite_step"] < 0) & ~jnp.isfinite(metrics["loss"])
    return {**new, "non_finite_step": jnp.where(first, step, sums["non_finite_step"])}


def epoch_means(sums: dict[str, jax.Array]) -> dict[str, float]:
    """Training metrics of an epoch from its sums: ``train_loss``, ``train_top1`` in percent, and each loss term.

    ``train_top5`` is among them where it was summed.
    """
    totals = {name: float(value) for name, value in jax.device_get(sums).items()}
    count = max(totals["count"], 1.0)
    terms = {name: value / count for name, value in totals.items() if "/" in name}
    shares = {"train_top1": "correct", "train_top5": "correct5"}
    accuracies = {name: 100.0 * totals[key] / count for name, key in shares.items() if key in totals}
    return {"train_loss": totals["loss"] / count, **accuracies, **terms}
