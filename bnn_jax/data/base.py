"""Images that lie in memory, and what every source of images has."""

import dataclasses
import hashlib

import numpy as np

from bnn_jax.data.streaming import StreamedSplit
from bnn_jax.errors import DataError

AUGMENTATIONS = ("pad_crop_flip", "pad_crop", "edge_crop_flip", "random_resized_crop_flip", "none")
DECODERS = ("pillow", "opencv")
LIGHTINGS = ("none", "release", "paper")


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


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """A whole data set, in memory or read while training, with everything that training on it needs to know.

    Attributes:
      name: key in the table of sources.
      num_classes: number of classes.
      image_shape: (H, W, C).
      train: images trained on.
      test: images evaluated on.
      validation: images held out from the training images to choose the best epoch, or None.
      mean: mean of pixels / 255, per channel.
      std: standard deviation of pixels / 255, per channel.
      augment: one of ``AUGMENTATIONS``.
      pad: zero padding before the random crop, in pixels per side.
      fingerprint: SHA-256 of the images and labels of all splits, in their order; of images that are read while
        training, of the description of their files and of which of them are used.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    train: Split | StreamedSplit
    test: Split | StreamedSplit
    validation: Split | StreamedSplit | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    pad: int
    fingerprint: str

    @property
    def streamed(self) -> bool:
        """Whether the images are read while training."""
        return not isinstance(self.train, Split)


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """What is asked of the loader of any source; each has its own options besides.

    Attributes:
      num_train: number of training images, the first ones in the stored order; None takes all.
      num_eval: number of test images, the first ones in the stored order; None takes all.
      data_dir: folder of prepared data sets; None is TFDS's default. Sources that need no files ignore it.
      progress: whether a progress bar is shown on stderr where loading takes time.
      decoder: what decodes training images that are read while training, one of ``DECODERS``.
    """

    num_train: int | None = None
    num_eval: int | None = None
    data_dir: str | None = None
    progress: bool = False
    decoder: str = "pillow"


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedImages:
    """What the loader of a source returns, before a validation split is taken.

    Attributes:
      train: the training images asked for.
      test: the test images asked for.
      num_classes: number of classes.
      mean: mean of pixels / 255, per channel.
      std: standard deviation of pixels / 255, per channel.
    """

    train: Split | StreamedSplit
    test: Split | StreamedSplit
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


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
