"""Reads the official CIFAR archives, packed or unpacked.

Nothing is unpacked to disk: members of an archive are read by name. The Python archives are pickles and are read
through ``restricted_pickle``, which runs nothing that a file asks for.
"""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import tarfile
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np

from bnn_jax import restricted_pickle
from bnn_jax.data.downloads.base import (
    CLASS_COUNTS,
    IMAGE_FOLDER,
    MD5,
    OFFICIAL_CLASSES,
    Download,
    DownloadedSplit,
    checked,
    compare_checksums,
)
from bnn_jax.errors import DataError, UserError

MAX_MEMBER_BYTES = 1 << 30  # the largest official file has 155 MB
PIXELS = 3 * 32 * 32  # three planes of 32 rows


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of an official CIFAR archive.

    Attributes:
      archive: its name.
      train: files of the training images, in order.
      test: file of the test images.
      names: feature name to the file with the names of its classes.
      pickled: whether the files are Python pickles; otherwise fixed-length records and text.
    """

    archive: str
    train: tuple[str, ...]
    test: str
    names: dict[str, str]
    pickled: bool

    @property
    def needed(self) -> tuple[str, ...]:
        """The files that hold images; class names are known without theirs."""
        return (*self.train, self.test)

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are read."""
        return (*self.needed, *self.names.values())


CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = {
    "cifar10": (
        Layout("cifar-10-python.tar.gz", CIFAR10_BATCHES, "test_batch", {"label": "batches.meta"}, True),
        Layout(
            "cifar-10-binary.tar.gz",
            tuple(f"{batch}.bin" for batch in CIFAR10_BATCHES),
            "test_batch.bin",
            {"label": "batches.meta.txt"},
            False,
        ),
    ),
    "cifar100": (
        Layout("cifar-100-python.tar.gz", ("train",), "test", {"coarse_label": "meta", "label": "meta"}, True),
        Layout(
            "cifar-100-binary.tar.gz",
            ("train.bin",),
            "test.bin",
            {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
            False,
        ),
    ),
}


def accepted(name: str) -> str:
    """What ``read`` accepts for 'cifar10' or 'cifar100', in words."""
    return f"{' or '.join(layout.archive for layout in LAYOUTS[name])}, a folder with its files, or {IMAGE_FOLDER}"


def read(name: str, source: pathlib.Path) -> Download:
    """Reads an official archive, or the folder of its unpacked files.

    Args:
      name: 'cifar10' or 'cifar100'.
      source: the archive or the folder.

    Raises:
      DataError: a file is missing, truncated, damaged, hostile or something else.
    """
    files, unofficial = _read_archive(name, source) if source.is_file() else _read_unpacked(name, source)
    layout = next(layout for layout in LAYOUTS[name] if all(file in files for file in layout.needed))
    parse_batch = _parse_pickled_batch if layout.pickled else _parse_binary_batch
    counts = CLASS_COUNTS[name]
    batches = {
        file: checked(parse_batch(files[file], counts, f"{source}, {file}"), counts, f"{source}, {file}")
        for file in layout.needed
    }
    names = {}
    for feature, file in layout.names.items():
        if file in files:
            names[feature] = _parse_class_names(
                files[file], feature, counts[feature], layout.pickled, f"{source}, {file}"
            )
        else:
            names[feature] = OFFICIAL_CLASSES[name][feature]
            unofficial = (*unofficial, f"{file} is missing in {source}: the official names of the classes are used")
    train = [batches[file] for file in layout.train]
    return Download(_concatenate(train), batches[layout.test], names, unofficial)


def _read_archive(name: str, source: pathlib.Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The needed files of a tar archive, by base name, and reasons to doubt it."""
    wanted = {file for layout in LAYOUTS[name] for file in layout.files}
    elsewhere = {file for other, layouts in LAYOUTS.items() if other != name for lay in layouts for file in lay.files}
    files: dict[str, bytes] = {}
    with source.open("rb") as stream:
        digest = hashlib.file_digest(stream, "md5").hexdigest()
        stream.seek(0)
        try:
            foreign = _collect(stream, wanted, elsewhere, files)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{source} is truncated or damaged, download it again: {reason}") from error
    _require(name, source, files.keys(), foreign)
    official = {MD5[layout.archive] for layout in LAYOUTS[name]}
    if digest in official:
        return files, ()
    expected = " or ".join(sorted(official))
    return files, (f"not the official archive: the MD5 of {source} is {digest}, expected {expected}",)


def _collect(stream: BinaryIO, wanted: set[str], elsewhere: set[str], files: dict[str, bytes]) -> set[str]:
    """Puts the wanted members into ``files``; returns which of ``elsewhere`` were seen."""
    compressed = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    content = gzip.GzipFile(fileobj=stream) if compressed else stream
    foreign = set()
    with tarfile.open(fileobj=content, mode="r|") as archive:
        for member in archive:
            base_name = pathlib.PurePosixPath(member.name).name
            if not member.isreg():
                continue
            if base_name in elsewhere:
                foreign.add(base_name)
            if base_name in wanted:
                if base_name in files or member.size > MAX_MEMBER_BYTES:
                    raise tarfile.TarError(f"{base_name} is there twice, or larger than any official file")
                reader = archive.extractfile(member)
                files[base_name] = reader.read() if reader is not None else b""
    # gzip's checksum stands at its end, behind the last member: only reading on to there compares it.
    while content.read(1 << 20):
        pass
    return foreign


def _read_unpacked(name: str, source: pathlib.Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The needed files of a folder, or of one folder below it, and reasons to doubt them."""
    wanted = {file for layout in LAYOUTS[name] for file in layout.files}
    folders = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    best = max(folders, key=lambda folder: sum((folder / file).is_file() for file in wanted))
    paths = [best / file for file in sorted(wanted) if (best / file).is_file()]
    _require(name, source, {path.name for path in paths}, set())
    files = {path.name: path.read_bytes() for path in paths}
    return files, compare_checksums(paths)


def _require(name: str, source: pathlib.Path, present: Iterable[str], foreign: set[str]) -> None:
    """Raises unless all files of one layout are there."""
    present = set(present)
    missing = {layout.archive: [file for file in layout.needed if file not in present] for layout in LAYOUTS[name]}
    if not all(missing.values()):
        return
    for other, layouts in LAYOUTS.items():
        if other != name and any(foreign.issuperset(layout.needed) for layout in layouts):
            raise DataError(f"{source} is the archive of {other}, not of {name}")
    archive, files = min(missing.items(), key=lambda item: len(item[1]))
    found = f"{', '.join(files)} of {archive} missing" if present else "none of its files found"
    raise DataError(f"{source} is no source of {name} ({found}): accepted is {accepted(name)}")


def _concatenate(splits: list[DownloadedSplit]) -> DownloadedSplit:
    labels = {feature: np.concatenate([split.labels[feature] for split in splits]) for feature in splits[0].labels}
    return DownloadedSplit(np.concatenate([split.images for split in splits]), labels)


def _parse_binary_batch(content: bytes, counts: dict[str, int], where: str) -> DownloadedSplit:
    """Records of one byte per label and 3072 bytes of pixels."""
    record = len(counts) + PIXELS
    if not content or len(content) % record:
        raise DataError(f"{where}: {len(content)} bytes are no whole number of {record}-byte images; it is truncated")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = {feature: records[:, column].astype(np.int64) for column, feature in enumerate(counts)}
    return DownloadedSplit(_planes_to_images(records[:, len(counts) :]), labels)


def _parse_pickled_batch(content: bytes, counts: dict[str, int], where: str) -> DownloadedSplit:
    """A dictionary with 'data' uint8 (N, 3072) and lists of labels."""
    batch = _unpickle(content, where)
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise DataError(f"{where}: 'data' is no uint8 array (N, {PIXELS})")
    keys = {"label": "labels" if len(counts) == 1 else "fine_labels", "coarse_label": "coarse_labels"}
    labels = {feature: _integers(batch.get(keys[feature]), f"{where}: '{keys[feature]}'") for feature in counts}
    return DownloadedSplit(_planes_to_images(data), labels)


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    try:
        batch = restricted_pickle.load_arrays(io.BytesIO(content))
    except UserError as error:
        raise DataError(f"{where}: {error}") from error
    if not isinstance(batch, dict):
        raise DataError(f"{where}: holds no dictionary")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in batch.items()}


def _integers(values: Any, what: str) -> np.ndarray:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list) or not all(type(value) is int and abs(value) < 2**31 for value in values):
        raise DataError(f"{what} is no list of integers")
    return np.array(values, np.int64)


def _planes_to_images(planes: np.ndarray) -> np.ndarray:
    """(N, 3072) -> (N, 32, 32, 3)."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _parse_class_names(content: bytes, feature: str, count: int, pickled: bool, where: str) -> tuple[str, ...]:
    if pickled:
        key = {10: "label_names", 100: "fine_label_names", 20: "coarse_label_names"}[count]
        values = _unpickle(content, where).get(key)
        values = values if isinstance(values, list) else []
        names = [name.decode("latin-1") if isinstance(name, bytes) else name for name in values]
    else:
        names = [line.strip() for line in content.decode("latin-1").splitlines() if line.strip()]
    valid = all(isinstance(name, str) and name and name.isprintable() for name in names)
    if len(set(names)) != count or len(names) != count or not valid:
        raise DataError(f"{where}: expected {count} different class names for '{feature}', found {len(names)}")
    return tuple(names)
