"""Reads images that lie in ``train/<class>/`` and ``test/<class>/``."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bnn_jax.data.downloads import class_names
from bnn_jax.data.downloads.base import OFFICIAL_CLASSES, Download, DownloadedSplit
from bnn_jax.data.tfds_source import TFDS_SETS, decode_image
from bnn_jax.errors import DataError

IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")


def is_image_folder(source: pathlib.Path) -> bool:
    """Whether both splits have a folder there."""
    return all((source / split).is_dir() for split in ("train", "test"))


def read(name: str, source: pathlib.Path, *, bar: Any) -> Download:
    """Reads a folder of images, one folder per class.

    Args:
      name: 'cifar10', 'cifar100' or 'mnist'.
      source: the folder.
      bar: a rich progress bar.

    Raises:
      DataError: the classes are others, or a file is no image, damaged or of another shape.
    """
    official = OFFICIAL_CLASSES[name].get("label", class_names.MNIST_CLASSES)
    unofficial = [f"not verified, no checksum exists for images in a folder: {source}"]
    train, train_is_lossy = _read_image_split(name, source / "train", official, bar)
    test, test_is_lossy = _read_image_split(name, source / "test", official, bar)
    if train_is_lossy or test_is_lossy:
        unofficial.append(f"JPEG images in {source}: their pixels are not the official ones, accuracies will differ")
    return Download(train, test, OFFICIAL_CLASSES[name], tuple(unofficial))


def _read_image_split(
    name: str, folder: pathlib.Path, official: tuple[str, ...], bar: Any
) -> tuple[DownloadedSplit, bool]:
    """The images of ``folder/<class>/``, class after class in order of their file names, and whether one is a JPEG."""
    class_folders = _class_folders(name, folder, official)
    paths = [(path, label) for label, directory in enumerate(class_folders) for path in _image_files(directory)]
    shape = TFDS_SETS[name].image_shape
    images = np.empty((len(paths), *shape), np.uint8)
    for index, (path, _) in enumerate(bar.track(paths, description=f"Reading {folder.name}")):
        images[index] = decode_image(path.read_bytes(), shape, str(path))
    labels = {"label": np.array([label for _, label in paths], np.int64)}
    if name == "cifar100":
        labels["coarse_label"] = np.array(class_names.CIFAR100_COARSE_LABELS, np.int64)[labels["label"]]
    lossy = any(path.suffix.lower() in (".jpg", ".jpeg") for path, _ in paths)
    return DownloadedSplit(images, labels), lossy


def _class_folders(name: str, folder: pathlib.Path, official: tuple[str, ...]) -> list[pathlib.Path]:
    """The folder of every class in order of the labels: official names, or all of the numbers 0, 1, ..."""
    found = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    numbers = tuple(str(number) for number in range(len(official)))
    for accepted in (official, numbers):
        if found == set(accepted):
            return [folder / class_name for class_name in accepted]
    wrong = sorted(found - set(official)) or sorted(set(official) - found)
    raise DataError(
        f"{folder} has {len(found)} class folders, not those of {name} (see {wrong[0]!r}): accepted are the official "
        f"names, {official[0]!r} to {official[-1]!r}, or the numbers 0 to {len(official) - 1}"
    )


def _image_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Images of one class, sorted by name.

    Raises:
      DataError: there is another file, or none.
    """
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{path} is no image: accepted are {', '.join(IMAGE_SUFFIXES)}")
    if not paths:
        raise DataError(f"{folder} holds no image")
    yield from paths
