"""Random bits, and the order in which images are visited: pure functions of seeds.

Every random choice here is made from the raw 64-bit stream of NumPy's Philox bit generator and a stable sort. NumPy
guarantees that stream for a fixed key in all versions (it does not guarantee ``Generator.permutation``), so the same
seed gives the same order, split and generated images everywhere.
"""

import enum

import numpy as np

from bnn_jax.errors import DataError


class Purpose(enum.IntEnum):
    """What random bits are for; equal seeds give unrelated bits for different purposes. Never renumber."""

    ORDER = 0
    VALIDATION = 1
    TEST_SPLIT = 2
    PATTERN = 3
    NOISE = 4
    CROP = 5
    STORED_ORDER = 6


def random_bits(seed: int, stream: int, *, purpose: Purpose, count: int, item: int = 0) -> np.ndarray:
    """Random 64-bit integers: a pure function of its arguments, the same in every version of NumPy.

    Args:
      seed: in [0, 2^64).
      stream: in [0, 2^64), such as the epoch.
      purpose: what the bits are for.
      count: number of integers.
      item: in [0, 2^64), such as an image; each has bits of its own.

    Returns:
      uint64 (count,).

    Raises:
      ValueError: the seed, the stream or the item is out of range.
    """
    if not (0 <= seed < 2**64 and 0 <= stream < 2**64 and 0 <= item < 2**64):
        raise ValueError(f"seed {seed}, stream {stream} and item {item} must be in [0, 2^64)")
    # The purpose is the highest word of the counter: streams of different purposes are 2^192 blocks apart, those of
    # different items 2^128.
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=(int(purpose) << 192) + (item << 128)).random_raw(count)


def permutation(seed: int, stream: int, *, purpose: Purpose, size: int) -> np.ndarray:
    """Random permutation of ``range(size)``, int32, by sorting random bits; see ``random_bits``."""
    return np.argsort(random_bits(seed, stream, purpose=purpose, count=size), kind="stable").astype(np.int32)


def index_plan(
    seed: int, epoch: int, *, num_images: int, batch_size: int, drop_last: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which images each step of an epoch trains on: a pure function of (seed, epoch) and the sizes.

    Args:
      seed: seed of the data order.
      epoch: 0-based epoch.
      num_images: number of training images.
      batch_size: images per step.
      drop_last: whether the last, partial batch is left out; otherwise it is filled up with index 0 and mask False.

    Returns:
      Indices int32 (steps, batch_size), a random permutation of all images; mask bool (steps, batch_size), True where
      the row counts.

    Raises:
      DataError: no batch is left.
    """
    if drop_last and num_images < batch_size:
        raise DataError(
            f"batch_size is {batch_size} and the last, partial batch is dropped, but there are only {num_images} "
            "training images: no batch is left"
        )
    order = permutation(seed, epoch, purpose=Purpose.ORDER, size=num_images)
    if drop_last:
        order = order[: num_images // batch_size * batch_size]
    return _batches(order, batch_size)


def sequential_plan(num_images: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images once in their stored order, for evaluation; the same pair of arrays as ``index_plan``."""
    return _batches(np.arange(num_images, dtype=np.int32), batch_size)


def _batches(order: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    if len(order) < 1 or batch_size < 1:
        raise ValueError(f"{len(order)} images in batches of {batch_size}: both must be positive")
    steps = -(-len(order) // batch_size)
    indices = np.zeros(steps * batch_size, np.int32)
    indices[: len(order)] = order
    mask = np.arange(steps * batch_size) < len(order)
    return indices.reshape(steps, batch_size), mask.reshape(steps, batch_size)


def stratified_choice(labels: np.ndarray, *, count: int, seed: int, purpose: Purpose) -> np.ndarray:
    """Chooses ``count`` images at random so that every class keeps its share.

    Each class gets the whole part of ``count * its share``; what is left goes one by one to the largest remainders
    (the lower class first where they are equal).

    Args:
      labels: int (N,).
      count: number of images to choose, in [0, N].
      seed: seed of the choice.
      purpose: purpose of the random bits.

    Returns:
      bool (N,), True for the chosen ones.
    """
    sizes = np.bincount(labels)
    quota, remainder = np.divmod(count * sizes, len(labels))
    largest_first = np.argsort(-remainder, kind="stable")
    quota[largest_first[: count - quota.sum()]] += 1
    chosen = np.zeros(len(labels), bool)
    order = permutation(seed, 0, purpose=purpose, size=len(labels))
    for label, number in enumerate(quota):
        chosen[order[labels[order] == label][:number]] = True
    return chosen
