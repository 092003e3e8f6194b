"""Scikit-learn's handwritten digits: a small real data set that needs no file and no network.

It lets the whole pipeline be tried anywhere. Results on it say nothing about the published data sets.
"""

import numpy as np

from bnn_jax.data.base import LoadedImages, LoadRequest, Split, limit
from bnn_jax.data.order import Purpose, permutation, stratified_choice
from bnn_jax.errors import DataError

NUM_TEST = 360  # a fifth of the 1,797 images
GREATEST_VALUE = 16  # the images hold 17 gray levels


def load(request: LoadRequest, *, image_size: int, seed: int) -> LoadedImages:
    """The 1,797 digits of 8x8 pixels: gray copied into three channels, enlarged bilinearly, 1,437 for training.

    Classes keep their shares in both splits. A digit's mirror image is no digit: prefer ``augment='pad_crop'``.

    Args:
      request: what is asked for; the folder is not used, the images are part of scikit-learn.
      image_size: side of the images in pixels, at least 8.
      seed: seed of the training and test split and of the stored order; not the seed of the training run, so that
        runs with different seeds are evaluated on the same images.

    Raises:
      DataError: an option is out of range.
    """
    from sklearn.datasets import load_digits

    if image_size < 8:
        raise DataError(f"config.data.image_size={image_size}: accepted is 8 or more for digits")
    bunch = load_digits()
    images = np.stack([_enlarge(image, image_size) for image in bunch.images])
    labels = bunch.target.astype(np.int32)
    is_test = stratified_choice(labels, count=NUM_TEST, seed=seed, purpose=Purpose.TEST_SPLIT)
    order = permutation(seed, 1, purpose=Purpose.TEST_SPLIT, size=len(labels))
    all_images = Split(images, labels)
    train, test = all_images.take(order[~is_test[order]]), all_images.take(order[is_test[order]])
    mean, std = _channel_statistics(train.images)
    num_train = limit("digits train", "num_train", asked=request.num_train, available=len(train))
    num_eval = limit("digits test", "num_eval", asked=request.num_eval, available=len(test))
    return LoadedImages(train.take(np.arange(num_train)), test.take(np.arange(num_eval)), 10, mean, std)


def _enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Gray (8, 8) in [0, 16] -> uint8 (size, size, 3)."""
    from PIL import Image

    gray = Image.fromarray(np.round(image * (255 / GREATEST_VALUE)).astype(np.uint8))
    enlarged = np.asarray(gray.resize((size, size), Image.Resampling.BILINEAR))
    return np.repeat(enlarged[:, :, None], 3, axis=2)


def _channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels / 255 per channel, to four digits as published constants are."""
    pixels = images / 255.0
    mean, std = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))
    return tuple(round(float(value), 4) for value in mean), tuple(round(float(value), 4) for value in std)
