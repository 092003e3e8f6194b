"""Self-distillation without a teacher: real-stream features, a bank of soft labels, clustering of the features.

Reference: SKD-BNN, Zeng et al. 2024 (Applied Intelligence 54, 4994); release: Wzixin/SKD-BNN. The paper's text was not
at hand; the formulas are those of the released code, section 2 of its specification.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bnn_jax.objectives.base import Batch, Objective, Outputs, masked_mean
from bnn_jax.objectives.distill import divergence
from bnn_jax.quantizers.base import QuantContext

COMPARISONS = ("channel_and_spatial", "elementwise")
FEATURES = ("features", "logits")
COSINE_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class FeatureSwap(Objective):
    """Distance of the binary features from the real stream's, averaged over all pairs of feature maps.

    Forward, ``compare='channel_and_spatial'``, per pair (N, H, W, C): u is the mean over positions divided by its L2
      norm, m the mean over channels divided by its norm, v and n the same of the real stream;
      ``(||u - v||_F / C + ||m - n||_F / (H * W)) / N`` with Frobenius norms over the whole batch.
    Forward, ``compare='elementwise'``, per pair (N, D): ``2 * ||a - r||_F / (D * N)``.
    Backward: into the binary features only, its norms constant; exactly 0 where the difference is 0.

    Attributes:
      weight: factor on the term.
      compare: how a pair is compared.

    Raises:
      ValueError: an unknown comparison; when called, a network that hands out no features.
    """

    compare: str = "channel_and_spatial"

    name = "feature_swap"
    needs = frozenset({"real_features"})

    def __post_init__(self):
        if self.compare not in COMPARISONS:
            raise ValueError(f"feature_swap: compare={self.compare!r}: accepted are {', '.join(COMPARISONS)}")

    def __call__(self, outputs: Outputs, batch: Batch, state: dict, ctx: QuantContext) -> jax.Array:
        if not outputs.block_features:
            raise ValueError("feature_swap: the network hands out no features; networks.base.keep_feature does")
        compare = channel_and_spatial_distance if self.compare == "channel_and_spatial" else elementwise_distance
        pairs = zip(outputs.block_features, outputs.real_features, strict=True)
        return jnp.mean(jnp.stack([compare(a, jax.lax.stop_gradient(r), batch.mask) for a, r in pairs]))


def channel_and_spatial_distance(a: jax.Array, r: jax.Array, mask: jax.Array) -> jax.Array:
    """Distance of two feature maps (N, H, W, C) over the rows of ``mask`` (N,); see ``FeatureSwap``."""
    count = jnp.maximum(jnp.sum(mask.astype(a.dtype)), 1)
    channel = _masked_norm(_unit(jnp.mean(a, (1, 2))) - _unit(jnp.mean(r, (1, 2))), mask) / a.shape[-1]
    spatial_a, spatial_r = (jnp.mean(x, -1).reshape(x.shape[0], -1) for x in (a, r))
    spatial = _masked_norm(_unit(spatial_a) - _unit(spatial_r), mask) / spatial_a.shape[-1]
    return (channel + spatial) / count


def elementwise_distance(a: jax.Array, r: jax.Array, mask: jax.Array) -> jax.Array:
    """Distance of two feature vectors (N, D) over the rows of ``mask`` (N,); see ``FeatureSwap``."""
    a, r = (x.reshape(x.shape[0], -1) for x in (a, r))
    count = jnp.maximum(jnp.sum(mask.astype(a.dtype)), 1)
    return 2 * _masked_norm(a - r, mask) / (a.shape[-1] * count)


def _unit(x: jax.Array) -> jax.Array:
    """Rows (N, D) divided by their norm, which is a constant in the gradient; zero rows stay zero."""
    norm = jax.lax.stop_gradient(jnp.linalg.norm(x, axis=-1, keepdims=True))
    return x / jnp.where(norm == 0, 1.0, norm)


def _masked_norm(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Frobenius norm over the valid rows, with gradient 0 (not NaN) where it is 0."""
    squares = jnp.sum(jnp.where(mask[:, None], jnp.square(x), 0.0))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True)
class LabelBank(Objective):
    """Distillation towards the mean logits of the class, collected over the previous epoch.

    Forward: ``temperature**2 * mean_n KL(softmax(bank[y_n] / T) || softmax(logits_n / T))``; 0 in the first epoch.
      During an epoch the logits of the images classified right (before the update) are summed per class; at its end
      ``bank = sum / count``. A class that was never right keeps its row, and has no loss until it has one; with
      ``strict_release`` its row is NaN, as in the released code.
    Backward: ordinary differentiation into the logits; the bank is a constant.

    Attributes:
      weight: factor on the term.
      temperature: T > 0.
      strict_release: NaN rows for classes that were never right.
      log_softmax: the bank collects log-probabilities instead of logits.
      reset_each_epoch: the bank is cleared at the start of every epoch, which makes the target uniform.

    Raises:
      ValueError: a temperature that is not positive.
    """

    temperature: float = 4.0
    strict_release: bool = False
    log_softmax: bool = False
    reset_each_epoch: bool = False

    name = "label_bank"

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"label_bank: temperature={self.temperature!r}: accepted are positive numbers")

    @property
    def pictures(self) -> frozenset[str]:
        # A bank that is cleared at the end of every epoch has nothing to show.
        return frozenset({"features"} if self.reset_each_epoch else {"label_bank", "features"})

    def init(self, num_classes: int) -> dict[str, jax.Array]:
        return {
            "bank": jnp.zeros((num_classes, num_classes), jnp.float32),
            "known": jnp.full((num_classes,), self.strict_release or self.reset_each_epoch),
            "sum": jnp.zeros((num_classes, num_classes), jnp.float32),
            "count": jnp.zeros((num_classes,), jnp.float32),
            "epochs": jnp.zeros((), jnp.int32),
        }

    def __call__(self, outputs: Outputs, batch: Batch, state: dict, ctx: QuantContext) -> jax.Array:
        # Rows are gathered, not multiplied by one-hot labels: a NaN row must not reach the other classes. Rows that
        # only fill up the batch get zeros: even multiplied by 0 a NaN would reach the gradient.
        targets = jnp.where(batch.mask[:, None], state["bank"][batch.labels], 0.0)
        rows = divergence(outputs.logits, targets, self.temperature)
        rows = jnp.where(state["known"][batch.labels] & batch.mask, rows, 0.0)
        count = jnp.maximum(jnp.sum(batch.mask.astype(rows.dtype)), 1)
        return jnp.where(state["epochs"] > 0, self.temperature**2 * jnp.sum(rows) / count, 0.0)

    def after_step(self, outputs: Outputs, batch: Batch, state: dict) -> dict[str, jax.Array]:
        logits = jax.nn.log_softmax(outputs.logits) if self.log_softmax else outputs.logits
        right = (jnp.argmax(outputs.logits, axis=-1) == batch.labels) & batch.mask
        rows = jnp.where(right[:, None], logits, 0.0)
        return {
            **state,
            "sum": state["sum"].at[batch.labels].add(rows),
            "count": state["count"].at[batch.labels].add(right.astype(jnp.float32)),
        }

    def after_epoch(self, state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        count = state["count"][:, None]
        if self.reset_each_epoch:
            bank, known = jnp.zeros_like(state["bank"]), state["known"]
        elif self.strict_release:
            bank, known = state["sum"] / count, state["known"]
        else:
            bank = jnp.where(count > 0, state["sum"] / jnp.maximum(count, 1), state["bank"])
            known = state["known"] | (state["count"] > 0)
        zeros = {name: jnp.zeros_like(state[name]) for name in ("sum", "count")}
        return {**state, **zeros, "bank": bank, "known": known, "epochs": state["epochs"] + 1}


@dataclasses.dataclass(frozen=True)
class Cluster(Objective):
    """Pull of every image's features towards the mean of its class in the batch.

    Forward: ``mean_n (1 - cos(p_n, c_{y_n})) / 2``, where c_y is the mean of the features p with label y in the batch.
    Backward: into p; the centres are constants. A class with one image contributes 0.

    Attributes:
      weight: factor on the term.
      on: 'features' (the classifier's input) or 'logits'.

    Raises:
      ValueError: another choice.
    """

    on: str = "features"

    name = "cluster"

    def __post_init__(self):
        if self.on not in FEATURES:
            raise ValueError(f"cluster: on={self.on!r}: accepted are {', '.join(FEATURES)}")

    @property
    def pictures(self) -> frozenset[str]:
        return frozenset({"features"})

    def __call__(self, outputs: Outputs, batch: Batch, state: dict, ctx: QuantContext) -> jax.Array:
        points = outputs.features if self.on == "features" else outputs.logits
        centres = jax.lax.stop_gradient(class_means(points, batch, num_classes=outputs.logits.shape[-1]))
        return masked_mean(0.5 * (1 - _cosine(points, centres[batch.labels])), batch.mask)


def class_means(points: jax.Array, batch: Batch, *, num_classes: int) -> jax.Array:
    """Mean of the rows (N, D) of each class, (K, D), over the valid rows; 0 for an absent class."""
    weight = batch.mask.astype(points.dtype)
    sums = jnp.zeros((num_classes, points.shape[-1]), points.dtype).at[batch.labels].add(points * weight[:, None])
    counts = jnp.zeros((num_classes,), points.dtype).at[batch.labels].add(weight)
    return sums / jnp.maximum(counts, 1)[:, None]


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of the rows of two matrices (N, D); norms are at least ``COSINE_EPSILON``."""

    def norm(x: Any) -> jax.Array:
        squares = jnp.sum(jnp.square(x), axis=-1)
        return jnp.maximum(jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) * (squares > 0), COSINE_EPSILON)

    return jnp.sum(a * b, axis=-1) / (norm(a) * norm(b))
