"""ImageNet as pixels: decoded and resized once, so that training only reads, crops and resizes.

A folder ``<data_dir>/imagenet2012_resized/<side>/`` holds, for each split, array_record shards and the labels, and an
index with the number of images, size and SHA-256 of every shard. A record is a header (label, height, width; little
endian) and the pixels, uint8 (height, width, 3). ``resize_imagenet`` writes it.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import struct
from typing import Any

import numpy as np

from bnn_jax.data import tfds_source
from bnn_jax.errors import DataError

NAME = "imagenet2012_resized"
FORMAT = 1
INDEX = "index.json"
HEADER = struct.Struct("<iHH")
NUM_CLASSES = 1000
SPLITS = ("train", "validation")
COMMAND = "python -m bnn_jax.data.prepare imagenet --source FOLDER --data_dir DATA_DIR"


def folder_of(data_dir: str | None, side: int) -> pathlib.Path:
    """The folder of the images whose shorter side has ``side`` pixels."""
    return tfds_source.absolute_data_dir(data_dir) / NAME / str(side)


def labels_file(split: str) -> str:
    """Name of the file with the labels of a split."""
    return f"{split}.labels.npy"


def encode(pixels: np.ndarray, label: int) -> bytes:
    """The record of an image uint8 (H, W, 3)."""
    return HEADER.pack(label, *pixels.shape[:2]) + np.ascontiguousarray(pixels).tobytes()


def decode(record: bytes) -> tuple[np.ndarray, int]:
    """Pixels uint8 (H, W, 3) and label of a record.

    Raises:
      ValueError: it is none.
    """
    if len(record) < HEADER.size:
        raise ValueError(f"{len(record)} bytes")
    label, height, width = HEADER.unpack_from(record)
    if len(record) != HEADER.size + 3 * height * width or not 0 <= label < NUM_CLASSES:
        raise ValueError(f"label {label}, {height}x{width} pixels in {len(record)} bytes")
    return np.frombuffer(record, np.uint8, offset=HEADER.size).reshape(height, width, 3), label


@dataclasses.dataclass(frozen=True)
class FileRange:
    """All records of a file, in the form that array_record asks for.

    Attributes:
      filename: path of the file.
      take: number of records in it.
      skip: number of records left out at the start.
    """

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        """Number of records in the file."""
        return self.take


class ResizedRecords:
    """Pixels and labels of a split. Copies in other processes open the files themselves.

    Attributes:
      folder: where the shards lie.
      split: 'train' or 'validation'.
    """

    def __init__(self, folder: pathlib.Path, split: str, entry: dict[str, Any]):
        self.folder, self.split, self._entry = folder, split, entry

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.split, self._entry)

    def __len__(self) -> int:
        return self._entry["count"]

    @property
    def name(self) -> str:
        """Name of the data set, the split and its folder."""
        return f"{NAME} {self.split} in {self.folder}"

    @property
    def description(self) -> str:
        """Number of images, size and digest of every shard; the labels are part of the shards too."""
        return json.dumps([NAME, self.split, self._entry], sort_keys=True)

    @functools.cached_property
    def _source(self) -> Any:
        from array_record.python import array_record_data_source as array_record

        # With the number of records grain's reader opens a shard when it is first asked for.
        return array_record.ArrayRecordDataSource(
            [FileRange(str(self.folder / shard["file"]), shard["count"]) for shard in self._entry["shards"]]
        )

    def read(self, numbers: list[int]) -> list[tuple[bytes | np.ndarray, int]]:
        """See ``streaming.Records``."""
        try:
            return [decode(record) for record in self._source.__getitems__(numbers)]
        except Exception as error:  # of the record reader or ``decode``: the file's content is damaged
            raise damaged(self.name, error) from error

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        path = self.folder / labels_file(self.split)
        try:
            content = path.read_bytes()
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise damaged(self.name, error) from error
        if hashlib.sha256(content).hexdigest() != self._entry["labels_sha256"] or labels.shape != (len(self),):
            raise damaged(self.name, f"{path.name} is not the one that was written")
        return labels.astype(np.int32)

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """See ``streaming.Records``; they lie in a file of their own."""
        return self._labels[numbers]


def open_split(split: str, data_dir: str | None, *, side: int) -> ResizedRecords:
    """The images of 'train' or 'validation'.

    Raises:
      DataError: they are not prepared there, or the files are not those of the index.
    """
    folder = folder_of(data_dir, side)
    index = _read_index(folder, side)
    entry = index["splits"][split]
    for shard in entry["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["size"]:
            raise damaged(f"{NAME} {split} in {folder}", f"{path.name} is missing or has another size")
    return ResizedRecords(folder, split, entry)


def _read_index(folder: pathlib.Path, side: int) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        others = sorted(other.parent.name for other in folder.parent.glob(f"*/{INDEX}"))
        hint = f"; config.data.side has {', '.join(others)} there" if others else ""
        raise DataError(f"{NAME} with a side of {side} is not prepared in {folder}{hint}: prepare it by `{COMMAND}`")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] == FORMAT and index["side"] == side and all(split in index["splits"] for split in SPLITS):
            return index
        found = f"format {index['format']}, side {index['side']}; expected are {FORMAT} and {side}"
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise damaged(f"{NAME} in {folder}", f"{INDEX}: {found}")


def damaged(what: str, reason: Exception | str) -> DataError:
    """The one line that says what is damaged, and what to do."""
    detail = " ".join(str(reason).split())[:200] or type(reason).__name__
    return DataError(f"{what} is damaged: remove that folder and prepare it again by `{COMMAND}` ({detail})")
