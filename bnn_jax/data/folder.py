"""What lies in a folder of pictures: ``train/<class>/*`` and ``test/<class>/*``, or ``<class>/*`` alone."""

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bnn_jax.data.order import Purpose, permutation
from bnn_jax.errors import DataError
from bnn_jax.picture_files import suffixes

ACCEPTED = "accepted is a folder with train/<class>/ and test/<class>/ (or val/<class>/)"
TEST_FOLDERS = ("test", "val", "validation")


class Found(NamedTuple):
    """What a folder holds; paths of files are below ``root``.

    Attributes:
      root: the folder.
      classes: names of the classes.
      train: path and label of the training pictures.
      test: those of the test pictures.
      foreign: files that are no pictures.
    """

    root: pathlib.Path
    classes: tuple[str, ...]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    foreign: list[str]


def find(data_dir: str | None, *, test_fraction: float = 0.0, seed: int = 0) -> Found:
    """Looks through a folder; no picture is opened.

    Args:
      data_dir: the folder.
      test_fraction: share of each class's pictures held out as test pictures; 0: these have a folder of their own.
      seed: seed of this choice, which depends on the names besides.

    Raises:
      DataError: it is no folder of pictures, has a class without pictures, or one in ``test`` alone.
    """
    root, train, test = _places(data_dir, test_fraction)
    classes = class_names(data_dir, test_fraction=test_fraction)
    pictures, foreign = _scan(train, classes)
    for label in sorted(set(range(len(classes))) - {label for _, label in pictures}):
        raise DataError(f"{train / classes[label]} holds no image: add some, or remove the folder")
    if test is None:
        held_out = _held_out(pictures, fraction=test_fraction, seed=seed)
        of_test = [row for row in pictures if row in held_out]
        pictures = [row for row in pictures if row not in held_out]
        test = train
    else:
        for name in _visible(test):
            if (test / name).is_dir() and name not in classes:
                raise DataError(f"{test / name}: {train} has no such class; accepted are {classes[0]} to {classes[-1]}")
        of_test, more = _scan(test, classes)
        foreign += more
    if not of_test:
        raise DataError(f"{test}: there is no picture to test with")

    def below(folder: pathlib.Path, rows: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return rows if folder == root else [(f"{folder.name}/{name}", label) for name, label in rows]

    return Found(root, classes, below(train, pictures), below(test, of_test), foreign)


def _places(data_dir: str | None, test_fraction: float) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path | None]:
    """The folder, that of the training pictures and that of the test pictures, None where some are held out."""
    if data_dir is None:
        raise DataError(f"config.data.data_dir=None: {ACCEPTED}")
    root = pathlib.Path(data_dir).expanduser().absolute()
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    train = root / "train"
    if test is not None and test_fraction:
        raise DataError(f"config.data.test_fraction={test_fraction}: {test} is there already; accepted with it is 0")
    if test is not None and train.is_dir():
        return root, train, test
    train = train if train.is_dir() else root
    if test is not None or not root.is_dir() or not any(map(os.path.isdir, map(train.joinpath, _visible(train)))):
        raise DataError(f"{root} holds no pictures to train on: {ACCEPTED}")
    if not test_fraction:
        raise DataError(
            f"{root} has no folder of test pictures: {ACCEPTED}, or config.data.test_fraction, a share of the pictures "
            "such as 0.2"
        )
    return root, train, None


def split_folders(data_dir: str | None) -> tuple[pathlib.Path, pathlib.Path]:
    """The folders of the training and the test pictures.

    Raises:
      DataError: one of them is missing.
    """
    _, train, test = _places(data_dir, 0.0)
    assert test is not None  # without a fraction there is one
    return train, test


def class_names(data_dir: str | None, *, test_fraction: float = 0.0) -> tuple[str, ...]:
    """Names of the folders of classes.

    Raises:
      DataError: fewer than two.
    """
    _, train, _ = _places(data_dir, test_fraction)
    names = tuple(name for name in _visible(train) if (train / name).is_dir())
    if len(names) < 2:
        raise DataError(f"{train} has {len(names)} folders of classes: accepted is 2 or more")
    return names


def _held_out(pictures: Sequence[tuple[str, int]], *, fraction: float, seed: int) -> set[tuple[str, int]]:
    """A share of each class, at least one picture of two or more: those whose names have the lowest hashes.

    The pictures come class after class.
    """

    def draw(row: tuple[str, int]) -> bytes:
        return hashlib.sha256(f"{seed}/{row[0]}".encode()).digest()

    chosen: set[tuple[str, int]] = set()
    for _, of_class in itertools.groupby(pictures, key=lambda row: row[1]):
        rows = sorted(of_class, key=draw)
        chosen.update(rows[: min(max(round(fraction * len(rows)), 1), len(rows) - 1)])
    return chosen


class FolderRecords:
    """Pictures in a folder, in a mixed order that is fixed for ever: the first ones are of all classes.

    Args:
      folder: the folder.
      files: path below it and label of each picture.
      stream: number of the order, another one for each split.

    Attributes:
      folder: the same.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[tuple[str, int]], *, stream: int):
        self.folder = folder
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


def picture_files(folder: pathlib.Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Path below the folder and label of every picture, class after class in the order of their names.

    Raises:
      DataError: a file is none of a picture, or a folder none of a class; or a folder holds no picture.
    """
    pictures, foreign = _scan(folder, classes)
    if foreign:
        raise DataError(f"{foreign[0]} is no image: accepted are the formats of Pillow, such as .jpg and .png")
    with_pictures = {label for _, label in pictures}
    for name in _visible(folder):
        if classes.index(name) not in with_pictures:
            raise DataError(f"{folder / name} holds no image")
    return pictures


def _scan(folder: pathlib.Path, classes: Sequence[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """Pictures below a folder as ``picture_files`` says, and the paths of other files.

    Raises:
      DataError: a folder is none of a class, or there is nothing.
    """
    labels = {name: label for label, name in enumerate(classes)}
    names = _visible(folder)
    if not names:
        raise DataError(f"{folder} is empty: {ACCEPTED}")
    pictures, foreign = [], []
    for name in sorted(names, key=lambda name: labels.get(name, -1)):
        if not (folder / name).is_dir():
            foreign.append(str(folder / name))
        elif name not in labels:
            raise DataError(f"{folder / name} is no folder of a class: accepted are {classes[0]} to {classes[-1]}")
        else:
            for path in _files_below(folder / name):
                if os.path.splitext(path)[1].lower() in suffixes():
                    pictures.append((os.path.relpath(path, folder), labels[name]))
                else:
                    foreign.append(path)
    return pictures, foreign


def _files_below(folder: str | os.PathLike) -> Iterator[str]:
    """Paths of the files in a folder and in those within it, in alphabetical order; hidden ones are left out."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            yield from _files_below(entry.path)
        else:
            yield entry.path


def _visible(folder: pathlib.Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
