"""What the readers of downloads have in common: the data in memory, known checksums, checks."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable

import numpy as np

from bnn_jax.data.downloads import class_names
from bnn_jax.errors import DataError

MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


# Labels of each data set and their numbers of classes; for CIFAR-100 in the order of the bytes of a binary record.
CLASS_COUNTS = {
    "cifar10": {"label": 10},
    "cifar100": {"coarse_label": 20, "label": 100},
    "mnist": {"label": 10},
}

# Names in the order of the labels; stock TFDS names no classes of MNIST.
OFFICIAL_CLASSES = {
    "cifar10": {"label": class_names.CIFAR10_CLASSES},
    "cifar100": {"coarse_label": tuple(class_names.CIFAR100_SUPERCLASSES), "label": class_names.CIFAR100_CLASSES},
    "mnist": {},
}

IMAGE_FOLDER = "a folder with images in train/<class>/ and test/<class>/"


@dataclasses.dataclass(frozen=True, eq=False)
class DownloadedSplit:
    """Images and labels in the order in which the files hold them.

    Attributes:
      images: uint8 (N, H, W, C).
      labels: feature name ('label', 'coarse_label') to int64 (N,).
    """

    images: np.ndarray
    labels: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Download:
    """A data set as it was downloaded.

    Attributes:
      train: training images.
      test: test images.
      class_names: feature name to the names of its classes; a feature that has none is left out.
      unofficial: one line per reason to doubt that this is the official data, empty if all checksums agree.
    """

    train: DownloadedSplit
    test: DownloadedSplit
    class_names: dict[str, tuple[str, ...]]
    unofficial: tuple[str, ...]


def compare_checksums(paths: Iterable[pathlib.Path]) -> tuple[str, ...]:
    """One line for the files whose checksum is another, one for those whose checksum is not known."""
    unknown, different = [], []
    for path in paths:
        expected = MD5.get(path.name)
        with path.open("rb") as stream:
            if expected is None:
                unknown.append(path)
            elif hashlib.file_digest(stream, "md5").hexdigest() != expected:
                different.append(path)
    lines = []
    if different:
        lines.append(f"not the official files, their MD5 is another: {', '.join(map(str, different))}")
    if unknown:
        lines.append(f"not verified, no checksum is known for: {', '.join(map(str, unknown))}")
    return tuple(lines)


def checked(split: DownloadedSplit, counts: dict[str, int], where: str) -> DownloadedSplit:
    """The split, after counts and ranges were found right.

    Args:
      split: what was read.
      counts: feature name to number of classes.
      where: name of the file, for messages.

    Raises:
      DataError: no image, labels out of range, or not one label per image.
    """
    if len(split.images) == 0:
        raise DataError(f"{where}: holds no image")
    for feature, labels in split.labels.items():
        if len(labels) != len(split.images):
            raise DataError(f"{where}: {len(split.images)} images, but {len(labels)} of '{feature}'")
        if labels.min() < 0 or labels.max() >= counts[feature]:
            outside = labels[(labels < 0) | (labels >= counts[feature])][0]
            raise DataError(f"{where}: {feature} {outside} is not in 0 to {counts[feature] - 1}")
    return split
