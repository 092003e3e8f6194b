"""CIFAR-10, CIFAR-100, MNIST and ImageNet from a prepared TFDS folder, without TensorFlow and without any download.

Records are read through ``tfds.data_source`` as stored bytes and decoded by us, so the pixels do not depend on which
decoder TFDS happens to find. What is read is checked against the data set's own description. ``load`` decodes all
images of a set at once; ``imagenet`` reads records when they are needed.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bnn_jax.data.base import LoadedImages, LoadRequest, Split, limit
from bnn_jax.errors import DataError

CHUNK = 1000  # records read at once; also the grain of the progress bar
IMAGE_FORMATS = ("WEBP", "PNG", "JPEG")  # naming them halves the decoding time: Pillow tries no other


@dataclasses.dataclass(frozen=True)
class TfdsSet:
    """What is expected of a data set.

    Attributes:
      image_shape: (H, W, C).
      num_classes: number of classes of the feature 'label'.
      mean: the usual mean of pixels / 255, per channel.
      std: the usual standard deviation of pixels / 255, per channel.
      source_hint: what to give to ``prepare --source``.
      command: the command that prepares it, with {folder}; the usual one is ``python -m bnn_jax.data.prepare NAME``.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source_hint: str
    command: str = ""


TFDS_SETS = {
    "cifar10": TfdsSet(
        image_shape=(32, 32, 3),
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        source_hint="cifar-10-python.tar.gz",
    ),
    "cifar100": TfdsSet(
        image_shape=(32, 32, 3),
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        source_hint="cifar-100-python.tar.gz",
    ),
    "mnist": TfdsSet(
        image_shape=(28, 28, 1),
        num_classes=10,
        mean=(0.1307,),
        std=(0.3081,),
        source_hint="FOLDER_OF_THE_FOUR_FILES",
    ),
    "imagenet2012": TfdsSet(
        image_shape=(224, 224, 3),
        num_classes=1000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        source_hint="FOLDER_OF_TRAIN_AND_VAL",
        command="tfds build imagenet2012 --file_format=array_record --data_dir {folder}",
    ),
}
# Those that lie in memory, and that ``prepare`` makes from downloads.
RESIDENT_SETS = ("cifar10", "cifar100", "mnist")


def load(name: str, request: LoadRequest) -> LoadedImages:
    """Reads and decodes a prepared data set; TFDS stores it shuffled, in an order that is fixed for ever.

    Args:
      name: 'cifar10', 'cifar100' or 'mnist'.
      request: what is asked for. Its folder holds ``<name>/<version>/``; None is TFDS's own: $TFDS_DATA_DIR, then
        ~/tensorflow_datasets.

    Raises:
      DataError: the set is not prepared, is damaged, or is not what its description says.
    """
    folder = absolute_data_dir(request.data_dir)
    check_prepared(name, folder)
    with progress_bar(request.progress) as bar:
        train = SplitReader(name, "train", folder).read("num_train", request.num_train, bar)
        test = SplitReader(name, "test", folder).read("num_eval", request.num_eval, bar)
    expected = TFDS_SETS[name]
    return LoadedImages(train, test, expected.num_classes, expected.mean, expected.std)


def class_names(name: str, data_dir: str | None) -> tuple[str, ...] | None:
    """Names of the classes of a prepared data set, as stored beside it; None where there is no complete list."""
    folder = pathlib.Path(data_dir or default_data_dir()).expanduser()
    # The newest version, which is the one that is read.
    for path in sorted(folder.glob(f"{name}/*/label.labels.txt"), reverse=True)[:1]:
        names = path.read_text(encoding="utf-8").split("\n")
        names = tuple(line.strip() for line in names if line.strip())
        return names if len(names) == TFDS_SETS[name].num_classes else None
    return None


def default_data_dir() -> str:
    """The folder TFDS uses when none is named."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")


def absolute_data_dir(data_dir: str | None) -> pathlib.Path:
    """The folder of prepared data sets; None is TFDS's own."""
    return pathlib.Path(data_dir or default_data_dir()).expanduser().absolute()


def prepare_command(name: str, folder: os.PathLike | str) -> str:
    """The command that prepares a data set in a folder."""
    if TFDS_SETS[name].command:
        return TFDS_SETS[name].command.format(folder=folder)
    return f"python -m bnn_jax.data.prepare {name} --source {TFDS_SETS[name].source_hint} --data_dir {folder}"


def check_prepared(name: str, folder: pathlib.Path) -> None:
    """Asks before TFDS does: for a set that is not there TFDS would offer to download it.

    Raises:
      DataError: the set is not there.
    """
    if any(folder.glob(f"{name}/*/dataset_info.json")):
        return
    for levels, pattern in ((folder.parent, "*/dataset_info.json"), (folder.parent.parent, "dataset_info.json")):
        if any(folder.glob(pattern)):
            raise DataError(
                f"config.data.data_dir={folder} is a data set's own folder: give the one above it, {levels}"
            )
    raise DataError(f"{name} is not prepared in {folder}: prepare it by `{prepare_command(name, folder)}`")


@contextlib.contextmanager
def progress_bar(show: bool) -> Iterator[Any]:
    """A rich progress bar on stderr, or one that takes all calls and shows nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        yield bar


class SplitReader:
    """Checked access to the records of one prepared split. Copies in other processes open the files themselves.

    Attributes:
      name: key in ``TFDS_SETS``.
      split: TFDS's name of the split.
      folder: folder of prepared data sets.
      expected: what is known of the data set.

    Raises:
      DataError: the records are stored as TFRecord, or their description is damaged.
    """

    def __init__(self, name: str, split: str, folder: pathlib.Path):
        self.name, self.split, self.folder, self.expected = name, split, folder, TFDS_SETS[name]
        self.version_folder = folder / name
        self.source = self._open()
        self.version_folder = pathlib.Path(self.source.dataset_info.data_dir)

    def __str__(self) -> str:
        return f"{self.name} {self.split} in {self.version_folder}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.split, self.folder)

    def read(self, key: str, asked: int | None, bar: Any) -> Split:
        """The first ``asked`` images, or all of them; ``key`` is what the config calls the number."""
        count = limit(f"{self.name} {self.split}", key, asked=asked, available=self.checked_length())
        images, labels = np.empty((count, *self.expected.image_shape), np.uint8), np.empty(count, np.int32)
        task = bar.add_task(f"Reading {self.name} {self.split}", total=count)
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            for index, (content, label) in enumerate(self.records(range(start, stop)), start):
                images[index] = decode_image(content, self.expected.image_shape, f"{self}, image {index}")
                labels[index] = label
            bar.update(task, completed=stop)
        return Split(images, labels)

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            return tfds.data_source(
                self.name, split=self.split, data_dir=str(self.folder), decoders=decoders, download=False
            )
        except NotImplementedError:
            raise DataError(
                f"{self.name} in {self.folder} is stored as TFRecord, which only TensorFlow reads: prepare it as "
                f"array_record in another folder by `{prepare_command(self.name, 'OTHER_FOLDER')}`"
            ) from None
        except Exception as error:  # TFDS raises many kinds for a damaged description; all mean the same here
            raise self._damaged(error) from error

    def checked_length(self) -> int:
        """Number of records, after the description, the files and what we know of the data set were found to agree."""
        info = self.source.dataset_info
        classes = info.features["label"].num_classes
        if classes != self.expected.num_classes:
            raise self._damaged(f"{classes} classes in its description, {self.expected.num_classes} expected")
        described = info.splits[self.split].num_examples
        stored = sum(self._records_in_file(path) for path in self.files())
        if not stored == described == len(self.source):
            raise self._damaged(f"{stored} records stored, {described} in its description")
        return described

    def files(self) -> list[pathlib.Path]:
        """The files of the split, in order."""
        return [pathlib.Path(path) for path in self.source.dataset_info.splits[self.split].filepaths]

    def _records_in_file(self, path: os.PathLike) -> int:
        from array_record.python import array_record_module

        try:
            reader = array_record_module.ArrayRecordReader(os.fspath(path))
            try:
                return reader.num_records()
            finally:
                reader.close()
        except Exception as error:
            raise self._damaged(error) from error

    def records(self, numbers: Sequence[int]) -> list[tuple[bytes, int]]:
        """Stored bytes and label of the images of these numbers.

        Raises:
          DataError: a record is damaged, or a label out of range.
        """
        try:
            records = self.source.__getitems__(list(numbers))
            pairs = [(record["image"], int(record["label"])) for record in records]
        except Exception as error:  # of the record reader, of protobuf or of TFDS: the file's content is damaged
            raise self._damaged(error) from error
        for index, (_, label) in zip(numbers, pairs):
            if not 0 <= label < self.expected.num_classes:
                raise DataError(f"{self}, image {index}: label {label} is not in 0 to {self.expected.num_classes - 1}")
        return pairs

    def _damaged(self, reason: Exception | str) -> DataError:
        detail = " ".join(str(reason).split())[:200] or type(reason).__name__
        command = prepare_command(self.name, self.folder)
        return DataError(f"{self} is damaged: remove that folder and prepare it again by `{command}` ({detail})")


def decode_image(content: bytes, shape: tuple[int, int, int], what: str) -> np.ndarray:
    """Decodes one stored image.

    Args:
      content: the file's bytes (WebP, PNG or JPEG).
      shape: expected (H, W, C).
      what: name of the image, for messages.

    Returns:
      uint8, of that shape.

    Raises:
      DataError: the bytes are no image, are damaged, or hold an image of another shape.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{what}: the image is corrupt ({reason})") from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    # The mode too: a palette image has the shape of a gray one.
    expected_mode = {1: "L", 3: "RGB"}[shape[-1]]
    if pixels.shape != shape or mode != expected_mode:
        raise DataError(f"{what}: shape {pixels.shape}, mode {mode}; expected {shape}, {expected_mode}")
    return pixels
