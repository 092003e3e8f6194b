"""Images that lie in memory, where the small ones come from, and what every source of images has."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bnn_jax.data.augment import opencv
from bnn_jax.data.order import Purpose, permutation, random_bits, stratified_choice
from bnn_jax.data.stream import Records, StreamedSplit
from bnn_jax.errors import DataError
from bnn_jax.picture_files import EVALUATION_MARGIN
from bnn_jax.stages import DataSpec

NUM_DIGITS_TEST = 360  # a fifth of the 1,797 images

NUM_SYNTHETIC = {"num_train": 512, "num_eval": 256}
PATTERN_SIZE = 8  # cells of a synthetic pattern per side
PATTERN_RANGE = 128  # cells lie in 64 to 191
NOISE_RANGE = 128  # an image's noise lies in -64 to 63, so that no pixel is clipped
CHUNK = 256  # synthetic images generated at once

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
      images: uint8 (N, H, W, C), raw pixels.
      labels: int32 (N,), in [0, number of classes).
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def take(self, indices: np.ndarray) -> "Split":
        """The images at ``indices``, integers or a mask (N,), in that order."""
        return Split(self.images[indices], self.labels[indices])

    def update_digest(self, digest: "hashlib._Hash") -> None:
        """Adds images and labels, in their order, to a digest."""
        digest.update(f"{self.images.shape} {self.images.dtype} {self.labels.dtype};".encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)


class Normalization(NamedTuple):
    """Mean and standard deviation of pixels / 255, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """A whole data set, in memory or read while training, with everything that training on it needs to know.

    A loader of a source leaves the fields from ``validation`` on to ``data.build``.

    Attributes:
      name: key in the table of sources.
      num_classes: number of classes.
      train: images trained on.
      test: images evaluated on.
      mean: mean of pixels / 255, per channel.
      std: standard deviation of pixels / 255, per channel.
      validation: images held out from the training images to choose the best epoch, or None.
      augment: one of ``augment.AUGMENTATIONS``.
      pad: zero padding before the random crop, in pixels per side.
      crop_margin: how much larger than an image a picture is resized before its middle is evaluated.
      notes: lines for the log about what was found.
      fingerprint: SHA-256 of the images and labels of all splits, in their order; of images that are read while
        training, of the description of their files and of which of them are used.
    """

    name: str
    num_classes: int
    train: Split | StreamedSplit
    test: Split | StreamedSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    _: dataclasses.KW_ONLY
    crop_margin: float = 1.0
    notes: tuple[str, ...] = ()
    validation: Split | StreamedSplit | None = None
    augment: str = "none"
    pad: int = 0
    fingerprint: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.train.image_shape

    @property
    def streamed(self) -> bool:
        """Whether the images are read while training."""
        return not isinstance(self.train, Split)


def limit(name: str, key: str, *, asked: int | None, available: int) -> int:
    """The number of images to use, ``asked`` or all.

    Args:
      name: name of the source, for the message.
      key: 'num_train' or 'num_eval'.
      asked: number asked for; None takes all.
      available: number of images there are.

    Raises:
      DataError: fewer than one or more than there are were asked for.
    """
    if asked is None:
        return available
    if not 1 <= asked <= available:
        raise DataError(f"config.data.{key}={asked}: {name} has {available} images, so accepted are 1 to {available}")
    return asked


def fingerprint(*splits: Split | StreamedSplit | None) -> str:
    """SHA-256 of what the splits hold, in their order; shapes are part of it, names of splits are not."""
    digest = hashlib.sha256()
    for position, split in enumerate(splits):
        if split is not None:
            digest.update(f"{position} ".encode())
            split.update_digest(digest)
    return digest.hexdigest()


def streamed_source(spec: DataSpec, train: Records, test: Records, *, num_classes: int, image_size: int) -> ImageSource:
    """The first pictures of both splits, to be read while training and normalised as ImageNet usually is.

    Raises:
      DataError: the size or a number of images is out of range, or the decoder is not installed.
    """
    if image_size < 1:
        raise DataError(f"config.data.image_size={image_size}: accepted is 1 or more")
    if spec.decoder == "opencv":
        opencv()
    splits = []
    for records, key, asked in ((train, "num_train", spec.num_train), (test, "num_eval", spec.num_eval)):
        count = limit(records.name, key, asked=asked, available=len(records))
        splits.append(StreamedSplit(records, np.arange(count), image_size, spec.decoder))
    (first, second), (mean, std) = splits, (IMAGENET_MEAN, IMAGENET_STD)
    return ImageSource(spec.name, num_classes, first, second, mean, std, crop_margin=EVALUATION_MARGIN)


def check_memory(keys: str, count: int, shape: Sequence[int], *, bytes_each: int = 1) -> None:
    """Checks, before they are made, that images find room in this machine.

    Args:
      keys: that decide about it, for the message.
      count: number of images.
      shape: (H, W, C).
      bytes_each: size of a number.

    Raises:
      DataError: they do not.
    """
    wanted, memory = count * math.prod(shape) * bytes_each, memory_size()
    if wanted > memory:
        images = f"{count:,} images of {'x'.join(map(str, shape))}"
        raise DataError(f"{keys}: {images} take {wanted / 2**30:,.0f} GiB: accepted are {memory / 2**30:,.0f} here")


def memory_size() -> int:
    """Bytes of memory of this machine, or of the container this process is in."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.is_file() else ""
    return min(size, int(limit)) if limit.isdecimal() else size


def digits(spec: DataSpec, data_dir: str | None, *, progress: bool, image_size: int) -> ImageSource:
    """Scikit-learn's 1,797 digits of 8x8 pixels, which need no file: gray in three channels, enlarged bilinearly.

    They let the whole pipeline be tried anywhere; results on them say nothing about the published data sets. 1,437 are
    for training, the same ones whatever the seed of a run; classes keep their shares in both splits. A digit's mirror
    image is no digit: prefer ``augment='pad_crop'``.

    Raises:
      DataError: the side ``image_size`` is below 8 pixels, or a number of images out of range.
    """
    from sklearn.datasets import load_digits

    del data_dir, progress
    if image_size < 8:
        raise DataError(f"config.data.image_size={image_size}: accepted is 8 or more for digits")
    bunch = load_digits()
    check_memory(f"config.data.image_size={image_size}", len(bunch.images), (image_size, image_size, 3))
    images = np.stack([_enlarge(image, image_size) for image in bunch.images])
    labels = bunch.target.astype(np.int32)
    is_test = stratified_choice(labels, count=NUM_DIGITS_TEST, seed=0, purpose=Purpose.TEST_SPLIT)
    order = permutation(0, 1, purpose=Purpose.TEST_SPLIT, size=len(labels))
    train, test = order[~is_test[order]], order[is_test[order]]
    pixels = images[train] / 255.0
    # To four digits, as published constants are.
    mean, std = (
        tuple(round(float(value), 4) for value in values) for values in (pixels.mean((0, 1, 2)), pixels.std((0, 1, 2)))
    )
    num_train = limit("digits train", "num_train", asked=spec.num_train, available=len(train))
    num_eval = limit("digits test", "num_eval", asked=spec.num_eval, available=len(test))
    both = Split(images, labels)
    return ImageSource(spec.name, 10, both.take(train[:num_train]), both.take(test[:num_eval]), mean, std)


def _enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Gray (8, 8) of 17 levels -> uint8 (size, size, 3)."""
    from PIL import Image

    gray = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    enlarged = np.asarray(gray.resize((size, size), Image.Resampling.BILINEAR))
    return np.repeat(enlarged[:, :, None], 3, axis=2)


def synthetic(
    spec: DataSpec, data_dir: str | None, *, progress: bool, image_size: int, num_classes: int
) -> ImageSource:
    """Generated images: they stand in for a data set that is not at hand, the same on every machine.

    Each class is a coarse random colour pattern; an image is its class's pattern plus noise. A small network learns
    them in a few steps. Every run of ``num_classes`` images holds each class once. An image depends on its own position
    only, so fewer images are the first of more images.

    Raises:
      DataError: the side ``image_size``, ``num_classes`` or a number of images is below 1.
    """
    del data_dir, progress
    counts = {"num_train": spec.num_train, "num_eval": spec.num_eval}
    num_train, num_eval = (NUM_SYNTHETIC[key] if value is None else value for key, value in counts.items())
    sizes = {"image_size": image_size, "num_classes": num_classes, "num_train": num_train, "num_eval": num_eval}
    for key, value in sizes.items():
        if value < 1:
            raise DataError(f"config.data.{key}={value}: accepted is 1 or more for synthetic")
    keys = f"config.data.image_size={image_size}, num_train={num_train}, num_eval={num_eval}"
    check_memory(keys, num_train + num_eval, (image_size, image_size, 3))
    shape = (num_classes, PATTERN_SIZE, PATTERN_SIZE, 3)
    patterns = _random_bytes(0, purpose=Purpose.PATTERN, shape=shape) % PATTERN_RANGE + (256 - PATTERN_RANGE) // 2
    train = _generate(patterns, num_train, image_size=image_size, first_stream=0)
    test = _generate(patterns, num_eval, image_size=image_size, first_stream=2**32)
    # Uniform pattern and uniform noise, each 128 levels wide: standard deviation sqrt(2) * 128 / sqrt(12) / 255.
    return ImageSource(spec.name, num_classes, train, test, (0.5, 0.5, 0.5), (0.205, 0.205, 0.205))


def _generate(patterns: np.ndarray, count: int, *, image_size: int, first_stream: int) -> Split:
    """``count`` images of the patterns (classes, cells, cells, 3) with noise from streams ``first_stream`` onwards."""
    num_classes = len(patterns)
    # One random permutation of the classes after another.
    rounds = range(first_stream + 1, first_stream + 1 - (-count // num_classes))
    labels = np.concatenate([permutation(0, r, purpose=Purpose.PATTERN, size=num_classes) for r in rounds])[:count]
    cell = np.arange(image_size) * PATTERN_SIZE // image_size
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    for start in range(0, count, CHUNK):
        chunk = images[start : start + CHUNK]
        noise = _random_bytes(first_stream + start // CHUNK, purpose=Purpose.NOISE, shape=chunk.shape) % NOISE_RANGE
        # Modulo 256 this is pattern + noise - 64, which lies in 0 to 254.
        chunk[:] = patterns[labels[start : start + CHUNK]][:, cell][:, :, cell] + (noise - np.uint8(NOISE_RANGE // 2))
    return Split(images, labels)


def _random_bytes(stream: int, *, purpose: Purpose, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform uint8 of a shape; little-endian order is fixed so that every machine gives the same."""
    size = int(np.prod(shape))
    bits = random_bits(0, stream, purpose=purpose, count=-(-size // 8))
    return bits.astype("<u8").view(np.uint8)[:size].reshape(shape)
