"""CIFAR-10, CIFAR-100, MNIST and ImageNet from a prepared TFDS folder, without TensorFlow and without any download.

Records are read through TFDS as stored bytes and decoded by us, so the pixels do not depend on which decoder TFDS
happens to find. What is read is checked against the data set's own description. ``load`` decodes all images of a small
set at once; ImageNet's pictures are read when they are needed.

``imagenet2012_resized`` is a TFDS folder too, written by ``prepare imagenet``: its pictures are decoded, the shorter
side is resized, and the pixels are stored as uncompressed PPM files, so that training only copies, crops and resizes.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from bnn_jax.data.memory import IMAGENET_MEAN, IMAGENET_STD, ImageSource, Split, limit, streamed_source
from bnn_jax.data.stream import decoding
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec

CHUNK = 1000  # records read at once; also the grain of the progress bar
IMAGE_FORMATS = ("WEBP", "PNG", "JPEG")  # naming them halves the decoding time: Pillow tries no other

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class TfdsSet:
    """What is expected of a data set.

    Attributes:
      image_shape: (H, W, C); of ImageNet, of the images that are usually made of its pictures.
      num_classes: number of classes of the feature 'label'.
      mean: the usual mean of pixels / 255, per channel.
      std: the usual standard deviation of pixels / 255, per channel.
      command: the command that prepares it, with {folder}.
      test: TFDS's name of the split that is evaluated on.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    command: str
    test: str = "test"

    @property
    def streamed(self) -> bool:
        """Whether it is too large to lie in memory."""
        return self.test == "validation"


RESIZED = "imagenet2012_resized"
_PREPARE = "python -m bnn_jax.data.prepare {} --source {} --data_dir {{folder}}".format
_BUILD = "tfds build imagenet2012 --file_format=array_record --data_dir {folder}"
_CIFAR10 = ((32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = ((32, 32, 3), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_IMAGENET = ((224, 224, 3), 1000, IMAGENET_MEAN, IMAGENET_STD)
TFDS_SETS = {
    "cifar10": TfdsSet(*_CIFAR10, _PREPARE("cifar10", "cifar-10-python.tar.gz")),
    "cifar100": TfdsSet(*_CIFAR100, _PREPARE("cifar100", "cifar-100-python.tar.gz")),
    "mnist": TfdsSet((28, 28, 1), 10, (0.1307,), (0.3081,), _PREPARE("mnist", "FOLDER_OF_THE_FOUR_FILES")),
    "imagenet2012": TfdsSet(*_IMAGENET, _BUILD, "validation"),
    RESIZED: TfdsSet(*_IMAGENET, _PREPARE("imagenet", "FOLDER"), "validation"),
}


def load(spec: DataSpec, data_dir: str | None, *, progress: bool, image_size: int | None = None) -> ImageSource:
    """A prepared data set: CIFAR or MNIST, decoded at once, or ImageNet, read while training.

    TFDS stores it shuffled, in an order that is fixed for ever. Of ImageNet, the official validation images, whose
    labels are public, are the 'test' split. For 'imagenet2012_resized', an evaluated image has the pixels of the JPEG
    path where the stored shorter side is ``256 / 224 * image_size``; a training crop is cut from the resized picture,
    so that a small one holds less detail than the same part of the original.

    Args:
      spec: name of the set, and how many images are asked for.
      data_dir: holds ``<name>/<version>/``; None is TFDS's own: $TFDS_DATA_DIR, then ~/tensorflow_datasets.
      progress: whether a progress bar is shown on stderr.
      image_size: of ImageNet, side of the images in pixels.

    Raises:
      DataError: the set is not prepared, is damaged, or is not what its description says.
    """
    known = TFDS_SETS[spec.name]
    train, test = (open_records(spec.name, split, data_dir, progress=progress) for split in ("train", known.test))
    if image_size is not None:
        return streamed_source(spec, train, test, num_classes=known.num_classes, image_size=image_size)
    num_train = limit(f"{spec.name} train", "num_train", asked=spec.num_train, available=len(train))
    num_eval = limit(f"{spec.name} test", "num_eval", asked=spec.num_eval, available=len(test))
    return ImageSource(
        spec.name, known.num_classes, train.decoded(num_train), test.decoded(num_eval), known.mean, known.std
    )


def class_names(name: str, data_dir: str | None) -> tuple[str, ...] | None:
    """Names of the classes of a prepared data set, as stored beside it; None where there is no complete list."""
    # The newest version, which is the one that is read.
    for path in sorted(absolute_data_dir(data_dir).glob(f"{name}/*/label.labels.txt"), reverse=True)[:1]:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
        return names if len(names) == TFDS_SETS[name].num_classes else None
    return None


def default_data_dir() -> str:
    """The folder TFDS uses when none is named."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")


def absolute_data_dir(data_dir: str | None) -> pathlib.Path:
    """The folder of prepared data sets; None is TFDS's own."""
    return pathlib.Path(data_dir or default_data_dir()).expanduser().absolute()


def track(items: Iterable[Item], description: str, *, total: int | None = None, show: bool) -> Iterable[Item]:
    """The items, with a progress bar on stderr while they are gone through."""
    from rich import progress
    from rich.console import Console

    return progress.track(items, description, total, console=Console(stderr=True), disable=not show)


def _version_folder(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The folder of the newest version.

    Raises:
      DataError: the set is not there.
    """
    import tensorflow_datasets as tfds

    versions = [path.parent for path in data_dir.glob(f"{name}/*/dataset_info.json")]
    versions = [path for path in versions if tfds.core.Version.is_valid(path.name)]
    if versions:
        return max(versions, key=lambda path: tfds.core.Version(path.name))
    for levels, pattern in ((data_dir.parent, "*/dataset_info.json"), (data_dir.parent.parent, "dataset_info.json")):
        if any(data_dir.glob(pattern)):
            raise DataError(
                f"config.data.data_dir={data_dir} is a data set's own folder: give the one above it, {levels}"
            )
    command = TFDS_SETS[name].command.format(folder=data_dir)
    hint = ""
    if name == "imagenet2012":
        resized = TFDS_SETS[RESIZED].command.format(folder=data_dir)
        hint = f", or config.data.name='{RESIZED}' reads `{resized}`"
    raise DataError(f"{name} is not prepared in {data_dir}: prepare it by `{command}`{hint}")


def open_records(name: str, split: str, data_dir: str | None, *, progress: bool = False) -> "TfdsRecords":
    """The records of a prepared split, after their description and the files were found to agree.

    Raises:
      DataError: the set is not prepared there, or is damaged.
    """
    records = TfdsRecords(name, split, _version_folder(name, absolute_data_dir(data_dir)), progress=progress)
    records.check()
    return records


class TfdsRecords:
    """The records of one prepared split. Copies in other processes open the files themselves.

    Attributes:
      split: TFDS's name of the split.
      folder: ``<data_dir>/<name>/<version>``.

    Raises:
      DataError: the records are stored as TFRecord, or their description is damaged.
    """

    def __init__(self, name: str, split: str, folder: pathlib.Path, *, progress: bool = False):
        self._set_name, self.split, self.folder, self._progress = name, split, folder, progress
        self._expected = TFDS_SETS[name]
        self._source = self._open()
        self._labels: np.ndarray | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._set_name, self.split, self.folder)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def name(self) -> str:
        """Name of the data set, the split and its folder."""
        return f"{self._set_name} {self.split} in {self.folder}"

    def name_of(self, number: int) -> str:
        """See ``stream.Records``."""
        return f"{self.name}, image {number}"

    @property
    def description(self) -> str:
        """Split, files with their sizes, number of images, and the digest of what TFDS says of the data set."""
        info = hashlib.sha256((self.folder / "dataset_info.json").read_bytes()).hexdigest()
        files = [[path.name, path.stat().st_size] for path in self._files()]
        return json.dumps([self._set_name, self.folder.name, self.split, len(self), files, info])

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            builder: Any = tfds.builder_from_directory(self.folder)
            return builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError:
            command = self._expected.command.format(folder="OTHER_FOLDER")
            raise DataError(
                f"{self._set_name} in {self.folder.parent.parent} is stored as TFRecord, which only TensorFlow reads: "
                f"prepare it as array_record in another folder by `{command}`"
            ) from None
        except Exception as error:  # TFDS raises many kinds for a damaged description; all mean the same here
            raise self._damaged(error) from error

    def check(self) -> None:
        """Raises a DataError unless the description, the files and what we know of the data set agree."""
        from array_record.python.array_record_module import ArrayRecordReader

        info = self._source.dataset_info
        classes, described = info.features["label"].num_classes, info.splits[self.split].num_examples
        if classes != self._expected.num_classes:
            raise self._damaged(f"{classes} classes in its description, {self._expected.num_classes} expected")
        stored = 0
        for path in self._files():
            try:
                reader = ArrayRecordReader(os.fspath(path))
                stored += reader.num_records()
                reader.close()
            except Exception as error:
                raise self._damaged(error) from error
        if not stored == described == len(self):
            raise self._damaged(f"{stored} records stored, {described} in its description")

    def _files(self) -> list[pathlib.Path]:
        return [pathlib.Path(path) for path in self._source.dataset_info.splits[self.split].filepaths]

    def read(self, numbers: Sequence[int]) -> list[tuple[bytes, int]]:
        """See ``stream.Records``.

        Raises:
          DataError: a record is damaged, or a label out of range.
        """
        try:
            records = self._source.__getitems__(list(numbers))
            pairs = [(record["image"], int(record["label"])) for record in records]
        except Exception as error:  # of the record reader, of protobuf or of TFDS: the file's content is damaged
            raise self._damaged(error) from error
        for number, (_, label) in zip(numbers, pairs):
            if not 0 <= label < self._expected.num_classes:
                raise DataError(
                    f"{self.name_of(number)}: label {label} is not in 0 to {self._expected.num_classes - 1}"
                )
        return pairs

    def _chunks(self, numbers: Sequence[int], description: str) -> Iterable[Sequence[int]]:
        chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
        return track(chunks, f"{description} {self._set_name} {self.split}", show=self._progress)

    def decoded(self, count: int) -> Split:
        """The first ``count`` images, in memory."""
        images, labels = np.empty((count, *self._expected.image_shape), np.uint8), np.empty(count, np.int32)
        for chunk in self._chunks(range(count), "Reading"):
            for number, (content, label) in zip(chunk, self.read(chunk)):
                images[number] = decode_image(content, self._expected.image_shape, self.name_of(number))
                labels[number] = label
        return Split(images, labels)

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """See ``stream.Records``: from a file beside the records, or from these, which hold image and label."""
        if self._labels is None:
            self._labels = self._stored_labels()
        missing = np.unique(numbers[self._labels[numbers] < 0])
        if len(missing):
            for chunk in self._chunks(missing.tolist(), "Reading labels of"):
                self._labels[list(chunk)] = [label for _, label in self.read(chunk)]
        return self._labels[numbers]

    def _stored_labels(self) -> np.ndarray:
        """Those of the file beside the records if there is one, else -1."""
        path = self.folder / labels_file(self.split)
        if not path.exists():
            return np.full(len(self), -1, np.int32)
        try:
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(error) from error
        if labels.shape != (len(self),) or labels.min() < 0 or labels.max() >= self._expected.num_classes:
            raise self._damaged(f"{path.name} does not fit the records")
        return labels.astype(np.int32)

    def _damaged(self, reason: Exception | str) -> DataError:
        detail = " ".join(str(reason).split())[:200] or type(reason).__name__
        command = self._expected.command.format(folder=self.folder.parent.parent)
        return DataError(f"{self.name} is damaged: remove that folder and prepare it again by `{command}` ({detail})")


def labels_file(split: str) -> str:
    """Name of the file with the labels of a split, which a set of large records has beside them."""
    return f"{split}.labels.npy"


def decode_image(content: bytes, shape: tuple[int, int, int], what: str) -> np.ndarray:
    """Decodes an image of a known shape (H, W, C) to uint8; ``what`` names it in messages.

    Raises:
      DataError: the bytes are no WebP, PNG or JPEG, are damaged, or hold an image of another shape.
    """
    from PIL import Image

    with decoding(what), Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
        mode, pixels = image.mode, np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    # The mode too: a palette image has the shape of a gray one.
    expected_mode = {1: "L", 3: "RGB"}[shape[-1]]
    if pixels.shape != shape or mode != expected_mode:
        raise DataError(f"{what}: shape {pixels.shape}, mode {mode}; expected {shape}, {expected_mode}")
    return pixels
