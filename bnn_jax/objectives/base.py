"""What a loss term is: it sees a batch and the network's outputs, may keep a state, and returns a scalar."""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from bnn_jax.knobs import Knob
from bnn_jax.quantizers.base import QuantContext


@flax.struct.dataclass
class Batch:
    """A prepared batch.

    Attributes:
      images: (N, H, W, C), float32, normalised.
      labels: (N,), int32.
      mask: (N,), bool, False for rows that only fill up the batch.
      other_labels: (N,), int32, of the images that were mixed into these; None where none were.
      share: (N,), float32, 1/2 to 1, share of each image that is its own, with its own label; None where all is.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array
    other_labels: jax.Array | None = None
    share: jax.Array | None = None

    def label_probabilities(self, num_classes: int) -> jax.Array:
        """(N, num_classes), the labels as probabilities: ``share * onehot(label) + (1 - share) * onehot(other)``."""
        own = jax.nn.one_hot(self.labels, num_classes)
        if self.share is None or self.other_labels is None:
            return own
        share = self.share[:, None]
        return share * own + (1 - share) * jax.nn.one_hot(self.other_labels, num_classes)


@flax.struct.dataclass
class Outputs:
    """What the forward passes of one step produced, before the update.

    Attributes:
      logits: (N, K).
      features: (N, D), input of the classifier.
      teacher_logits: (N, K) of the teacher in evaluation mode, or None where no objective asks for it.
      block_features: feature maps inside the network, sorted by path; () where no objective asks for them.
      real_features: the same of the real stream, without gradient.
    """

    logits: jax.Array
    features: jax.Array
    teacher_logits: jax.Array | None = None
    block_features: tuple[jax.Array, ...] = ()
    real_features: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base of the loss terms. The loss of a step is the sum over its objectives.

    Attributes:
      weight: factor on the term.
    """

    weight: float = 1.0

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What the step has to provide besides logits and features: 'teacher_logits', 'real_features'."""
    knobs: ClassVar[tuple[Knob, ...]] = ()
    """The knobs this term reads; a stage gives each of them a schedule."""

    @property
    def pictures(self) -> frozenset[str]:
        """Pictures a finished stage with this term can show, keys of ``bnn_jax.report.pictures.PICTURES``."""
        return frozenset()

    def init(self, num_classes: int) -> Any:
        """State at the start of a stage, a pytree of arrays; {} if the term has none."""
        return {}

    def __call__(self, outputs: Outputs, batch: Batch, state: Any, ctx: QuantContext) -> jax.Array:
        """The term without its weight, a scalar float32, as it is logged."""
        raise NotImplementedError

    def after_step(self, outputs: Outputs, batch: Batch, state: Any) -> Any:
        """State after a step; called inside jit with the outputs from before the update."""
        return state

    def after_epoch(self, state: Any) -> Any:
        """State after an epoch."""
        return state


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of per-row values (N,) over the rows where ``mask`` (N,) is True."""
    weight = mask.astype(values.dtype)
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1)
