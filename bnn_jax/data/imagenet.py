"""ImageNet, read while training: JPEG files in a TFDS folder, or the resized pixels that ``prepare imagenet`` writes.

Both give ``StreamedSplit``s. Of the official validation images, the ones with public labels, our 'test' split is made.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from bnn_jax.data import crops, resized, tfds_source
from bnn_jax.data.base import LoadedImages, LoadRequest, limit
from bnn_jax.data.streaming import Records, StreamedSplit
from bnn_jax.errors import DataError

NAME = "imagenet2012"
RESIZED_NAME = resized.NAME


class TfdsRecords:
    """Files of pictures and their labels in a TFDS folder.

    Attributes:
      reader: checked access to the records.
    """

    def __init__(self, reader: tfds_source.SplitReader, count: int, *, progress: bool = False):
        self.reader, self._count, self._progress = reader, count, progress
        self._labels = np.full(count, -1, np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the labels: the processes that read do not need them.
        return type(self), (self.reader, self._count)

    def __len__(self) -> int:
        return self._count

    @property
    def name(self) -> str:
        """Name of the data set, the split and its folder."""
        return str(self.reader)

    @property
    def description(self) -> str:
        """Split, files with their sizes, number of images, and the digest of what TFDS says of the data set."""
        folder = self.reader.version_folder
        info = hashlib.sha256((folder / "dataset_info.json").read_bytes()).hexdigest()
        files = [[path.name, path.stat().st_size] for path in self.reader.files()]
        return json.dumps([self.reader.name, folder.name, self.reader.split, len(self), files, info])

    def read(self, numbers: list[int]) -> list[tuple[bytes | np.ndarray, int]]:
        """See ``streaming.Records``."""
        return list(self.reader.records(numbers))

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """See ``streaming.Records``; TFDS stores a label beside its image only, so that this reads whole records."""
        missing = np.unique(numbers[self._labels[numbers] < 0])
        with tfds_source.progress_bar(self._progress) as bar:
            task = bar.add_task(f"Reading labels of {self.reader.name} {self.reader.split}", total=len(missing))
            for start in range(0, len(missing), tfds_source.CHUNK):
                chunk = missing[start : start + tfds_source.CHUNK]
                self._labels[chunk] = [label for _, label in self.reader.records(chunk.tolist())]
                bar.update(task, advance=len(chunk))
        return self._labels[numbers]


def open_tfds(split: str, data_dir: str | None, *, progress: bool = False) -> TfdsRecords:
    """The records of 'train' or 'validation', after their description and the files were found to agree.

    Raises:
      DataError: ImageNet is not prepared there, or is damaged.
    """
    folder = tfds_source.absolute_data_dir(data_dir)
    try:
        tfds_source.check_prepared(NAME, folder)
    except DataError as error:
        raise DataError(f"{error}, or config.data.name='{RESIZED_NAME}' reads `{resized.COMMAND}`") from None
    reader = tfds_source.SplitReader(NAME, split, folder)
    return TfdsRecords(reader, reader.checked_length(), progress=progress)


def official_classes() -> tuple[str, ...]:
    """The WordNet numbers of the 1,000 classes in the order of their labels ('n01440764' to 'n15075141')."""
    import tensorflow_datasets as tfds

    path = tfds.builder_cls(NAME).pkg_dir_path / "labels.txt"
    return tuple(path.read_text().split())


def load(request: LoadRequest, *, image_size: int) -> LoadedImages:
    """ImageNet's JPEG files in a TFDS folder.

    Args:
      request: what is asked for.
      image_size: side of the images in pixels.

    Raises:
      DataError: ImageNet is not prepared there, is damaged, or the decoder is not installed.
    """
    return _load(request, lambda split: open_tfds(split, request.data_dir, progress=request.progress), image_size)


def load_resized(request: LoadRequest, *, image_size: int, side: int) -> LoadedImages:
    """ImageNet's images as ``prepare imagenet`` stored them: pixels, the shorter side of ``side`` pixels.

    For ``side = 256 / 224 * image_size`` an evaluated image has the pixels of the JPEG path. A training crop is cut
    from the resized image: a small one holds less detail than the same part of the original.

    Args:
      request: what is asked for.
      image_size: side of the images in pixels.
      side: length of the stored images' shorter side in pixels.

    Raises:
      DataError: they are not there, are damaged, or the decoder is not installed.
    """
    return _load(request, lambda split: resized.open_split(split, request.data_dir, side=side), image_size)


def _load(request: LoadRequest, open_split: Callable[[str], Records], image_size: int) -> LoadedImages:
    if image_size < 1:
        raise DataError(f"config.data.image_size={image_size}: accepted is 1 or more")
    if request.decoder == "opencv":
        crops.opencv()

    def first(split: str, key: str, asked: int | None) -> StreamedSplit:
        records = open_split(split)
        count = limit(f"{NAME} {split}", key, asked=asked, available=len(records))
        return StreamedSplit(records, np.arange(count), image_size, request.decoder)

    known = tfds_source.TFDS_SETS[NAME]
    train = first("train", "num_train", request.num_train)
    test = first("validation", "num_eval", request.num_eval)
    return LoadedImages(train, test, known.num_classes, known.mean, known.std)
