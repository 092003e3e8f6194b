"""Generated images of any size and number of classes: they stand in for a data set that is not at hand.

Each class is a coarse random colour pattern; an image is its class's pattern plus noise. A small network learns them in
a few steps, so a smoke run shows that learning works. Accuracies on them mean nothing else.
"""

import numpy as np

from bnn_jax.data.base import LoadedImages, LoadRequest, Split, limit
from bnn_jax.data.order import Purpose, permutation, random_bits
from bnn_jax.errors import DataError

PATTERN_SIZE = 8  # cells of a pattern per side
PATTERN_RANGE = 128  # cells lie in 64 to 191
NOISE_RANGE = 128  # an image's noise lies in -64 to 63, so that no pixel is clipped
CHUNK = 256  # images generated at once

# Uniform pattern and uniform noise, each 128 levels wide: standard deviation sqrt(2) * 128 / sqrt(12) / 255.
MEAN, STD = (0.5, 0.5, 0.5), (0.205, 0.205, 0.205)


def load(
    request: LoadRequest, *, image_size: int, num_classes: int, num_train: int, num_test: int, seed: int
) -> LoadedImages:
    """Generates both splits: a pure function of the options, the same on every machine.

    An image depends on its own position only, so fewer images are the first of more images with the same options.

    Args:
      request: what is asked for; the folder is not used.
      image_size: side of the images in pixels.
      num_classes: number of classes; every run of ``num_classes`` images holds each class once.
      num_train: number of training images that exist.
      num_test: number of test images that exist.
      seed: seed of patterns, labels and noise; not the seed of the training run.

    Raises:
      DataError: an option is out of range.
    """
    options = {"image_size": image_size, "num_classes": num_classes, "num_train": num_train, "num_test": num_test}
    for key, value in options.items():
        if value < 1:
            raise DataError(f"config.data.{key}={value}: accepted is 1 or more for synthetic")
    num_train = limit("synthetic train", "num_train", asked=request.num_train, available=num_train)
    num_eval = limit("synthetic test", "num_eval", asked=request.num_eval, available=num_test)
    shape = (num_classes, PATTERN_SIZE, PATTERN_SIZE, 3)
    patterns = _random_bytes(seed, 0, purpose=Purpose.PATTERN, shape=shape) % PATTERN_RANGE + (256 - PATTERN_RANGE) // 2
    train = _generate(patterns, num_train, image_size=image_size, seed=seed, first_stream=0)
    test = _generate(patterns, num_eval, image_size=image_size, seed=seed, first_stream=2**32)
    return LoadedImages(train, test, num_classes, MEAN, STD)


def _generate(patterns: np.ndarray, count: int, *, image_size: int, seed: int, first_stream: int) -> Split:
    """``count`` images of the patterns (classes, cells, cells, 3) with noise from streams ``first_stream`` onwards."""
    labels = _labels(count, len(patterns), seed=seed, first_stream=first_stream)
    cell = np.arange(image_size) * PATTERN_SIZE // image_size
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    for start in range(0, count, CHUNK):
        chunk = images[start : start + CHUNK]
        stream = first_stream + start // CHUNK
        noise = _random_bytes(seed, stream, purpose=Purpose.NOISE, shape=chunk.shape) % NOISE_RANGE
        # Modulo 256 this is pattern + noise - 64, which lies in 0 to 254.
        chunk[:] = patterns[labels[start : start + CHUNK]][:, cell][:, :, cell] + (noise - np.uint8(NOISE_RANGE // 2))
    return Split(images, labels)


def _labels(count: int, num_classes: int, *, seed: int, first_stream: int) -> np.ndarray:
    """Labels int32 (count,): one random permutation of the classes after another."""
    rounds = -(-count // num_classes)
    rows = [
        permutation(seed, first_stream + r, purpose=Purpose.PATTERN, size=num_classes) for r in range(1, rounds + 1)
    ]
    return np.concatenate(rows)[:count]


def _random_bytes(seed: int, stream: int, *, purpose: Purpose, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform uint8 of a shape; little-endian order is fixed so that every machine gives the same."""
    size = int(np.prod(shape))
    bits = random_bits(seed, stream, purpose=purpose, count=-(-size // 8))
    return bits.astype("<u8").view(np.uint8)[:size].reshape(shape)
