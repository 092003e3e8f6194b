"""A folder of pictures, ``train/<class>/*`` and ``test/<class>/*``, of any size and format, read while training."""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from bnn_jax.data.augment import picture_formats
from bnn_jax.data.memory import ImageSource, streamed_source
from bnn_jax.data.order import Purpose, permutation
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec

ACCEPTED = "accepted is a folder with train/<class>/ and test/<class>/ (or val/<class>/)"
TEST_FOLDERS = ("test", "val", "validation")


def load(spec: DataSpec, data_dir: str | None, *, progress: bool, image_size: int) -> ImageSource:
    """The pictures of a folder; its classes are the folders in ``train``, in alphabetical order.

    Args:
      spec: how many images are asked for.
      data_dir: the folder.
      progress: not used.
      image_size: side of the images in pixels.

    Raises:
      DataError: it is no such folder, holds something else, or the decoder is not installed.
    """
    del progress
    folders = split_folders(data_dir)
    classes = class_names(data_dir)
    train, test = (FolderRecords(folder, classes, stream=stream) for stream, folder in enumerate(folders))
    return streamed_source(spec, train, test, num_classes=len(classes), image_size=image_size)


def split_folders(data_dir: str | None) -> tuple[pathlib.Path, pathlib.Path]:
    """The folders of the training and the test pictures.

    Raises:
      DataError: one of them is missing.
    """
    if data_dir is None:
        raise DataError(f"config.data.data_dir=None: {ACCEPTED}")
    root = pathlib.Path(data_dir).expanduser().absolute()
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if test is None or not (root / "train").is_dir():
        raise DataError(f"{root} holds no pictures to train on: {ACCEPTED}")
    return root / "train", test


def class_names(data_dir: str | None) -> tuple[str, ...]:
    """Names of the folders in ``train``.

    Raises:
      DataError: fewer than two.
    """
    train, _ = split_folders(data_dir)
    names = tuple(name for name in _visible(train) if (train / name).is_dir())
    if len(names) < 2:
        raise DataError(f"{train} has {len(names)} folders of classes: accepted is 2 or more")
    return names


class FolderRecords:
    """Pictures in ``<folder>/<class>/``, in a mixed order that is fixed for ever: the first ones are of all classes.

    Args:
      folder: the folder of the class folders.
      classes: their names in the order of the labels; some may be absent.
      stream: number of the order, another one for each split.

    Attributes:
      folder: the same.

    Raises:
      DataError: there is something else in the folder, or no picture.
    """

    def __init__(self, folder: pathlib.Path, classes: Sequence[str], *, stream: int):
        self.folder = folder
        files = list(picture_files(folder, classes))
        self._files = [files[index] for index in permutation(0, stream, purpose=Purpose.STORED_ORDER, size=len(files))]
        self._labels = np.array([label for _, label in self._files], np.int32)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    def name_of(self, number: int) -> str:
        """The path of a picture."""
        return str(self.folder / self._files[number][0])

    @property
    def description(self) -> str:
        """Names and labels of all files, in the stored order."""
        return json.dumps([self.folder.name, self._files])

    def read(self, numbers: Sequence[int]) -> list[tuple[bytes, int]]:
        """See ``stream.Records``."""
        try:
            return [((self.folder / name).read_bytes(), label) for name, label in map(self._files.__getitem__, numbers)]
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """See ``stream.Records``."""
        return self._labels[numbers]


def picture_files(folder: pathlib.Path, classes: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Path below the folder and label of every picture, class after class in the order of their names.

    Raises:
      DataError: a file is none of a picture, or a folder none of a class; or there is no picture.
    """
    labels = {name: label for label, name in enumerate(classes)}
    suffixes = {suffix for of_format in picture_formats().values() for suffix in of_format}
    names = _visible(folder)
    if not names:
        raise DataError(f"{folder} is empty: {ACCEPTED}")
    for name in names:
        if name not in labels or not (folder / name).is_dir():
            raise DataError(f"{folder / name} is no folder of a class: accepted are {classes[0]} to {classes[-1]}")
    for name in sorted(names, key=labels.__getitem__):
        files = _visible(folder / name)
        if not files:
            raise DataError(f"{folder / name} holds no image")
        for file in files:
            if os.path.splitext(file)[1].lower() not in suffixes:
                raise DataError(
                    f"{folder / name / file} is no image: accepted are the formats of Pillow, such as .jpg and .png"
                )
            yield f"{name}/{file}", labels[name]


def _visible(folder: pathlib.Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
