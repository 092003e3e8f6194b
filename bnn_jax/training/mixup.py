"""Mixup: a network is trained on weighted means of two images, with the same means of their labels."""

import jax
import jax.numpy as jnp

from bnn_jax.objectives.base import Batch


def mixed(batch: Batch, key: jax.Array, *, alpha: float) -> Batch:
    """A batch in which another image of it is mixed into every valid one.

    Forward: ``x_n <- l x_n + (1 - l) x_p(n)``, p a random permutation of the valid rows, ``l = max(b, 1 - b)``, one
    ``b ~ Beta(alpha, alpha)`` for the batch. The larger share is an image's own, so that its own label is the one that
    accuracies in training are counted by; over all permutations that changes nothing.

    Args:
      batch: prepared images; augmentation and normalisation come first.
      key: random key of the step.
      alpha: greater than 0.

    Returns:
      The batch, with ``other_labels`` and ``share``.

    Reference: Zhang et al. 2018 (arXiv 1710.09412); one share per batch: release: facebookresearch/mixup-cifar10.
    """
    order_key, share_key = jax.random.split(key)
    drawn = jax.random.beta(share_key, alpha, alpha)
    share = jnp.maximum(drawn, 1 - drawn)
    partner = permutation_of_valid(order_key, batch.mask)
    return batch.replace(
        images=share * batch.images + (1 - share) * batch.images[partner],
        other_labels=batch.labels[partner],
        share=jnp.full(batch.labels.shape, share),
    )


def permutation_of_valid(key: jax.Array, mask: jax.Array) -> jax.Array:
    """int32 (N,): for every row where ``mask`` (N,) is True another such row or itself; the other rows stay."""
    draws = jax.random.uniform(key, mask.shape)
    # The valid rows in random order, then the others, whose partners do not matter but must not be valid rows' own.
    order = jnp.argsort(jnp.where(mask, draws, 2.0))
    number = jnp.cumsum(mask) - 1
    return jnp.where(mask, order[number], jnp.arange(len(mask)))
