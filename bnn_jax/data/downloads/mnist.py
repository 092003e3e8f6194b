"""Reads the four files of MNIST."""

import gzip
import pathlib
import zlib

import numpy as np

from bnn_jax.data.downloads.base import (
    CLASS_COUNTS,
    IMAGE_FOLDER,
    Download,
    DownloadedSplit,
    checked,
    compare_checksums,
)
from bnn_jax.errors import DataError

ACCEPTED = f"a folder with train-images-idx3-ubyte.gz and its three companions, or {IMAGE_FOLDER}"


def read(source: pathlib.Path) -> Download:
    """Reads a folder of the four files, compressed or not.

    Raises:
      DataError: a file is missing, truncated, damaged or something else.
    """
    if not source.is_dir():
        raise DataError(f"--source {source} is a file: accepted is {ACCEPTED}")
    paths = {
        (split, kind): _find_idx(source, split, kind) for split in ("train", "t10k") for kind in ("images", "labels")
    }
    splits = []
    for split in ("train", "t10k"):
        images = _parse_idx(paths[split, "images"], dimensions=3)
        labels = _parse_idx(paths[split, "labels"], dimensions=1).astype(np.int64)
        if images.shape[1:] != (28, 28):
            raise DataError(f"{paths[split, 'images']}: images of {images.shape[1:]} pixels, expected (28, 28)")
        found = DownloadedSplit(images[..., None], {"label": labels})
        splits.append(checked(found, CLASS_COUNTS["mnist"], str(paths[split, "images"])))
    return Download(splits[0], splits[1], {}, compare_checksums(paths.values()))


def _find_idx(source: pathlib.Path, split: str, kind: str) -> pathlib.Path:
    """Path of an idx file: in the folder or the ones torchvision makes, compressed or not, '-idx' or '.idx'."""
    dimensions = {"images": 3, "labels": 1}[kind]
    for folder in (source, source / "raw", source / "MNIST" / "raw"):
        for separator in "-.":
            for suffix in (".gz", ""):
                path = folder / f"{split}-{kind}{separator}idx{dimensions}-ubyte{suffix}"
                if path.is_file():
                    return path
    missing = f"{split}-{kind}-idx{dimensions}-ubyte.gz"
    raise DataError(f"{source} is no source of mnist ({missing} missing): accepted is {ACCEPTED}")


def _parse_idx(path: pathlib.Path, *, dimensions: int) -> np.ndarray:
    """An idx file of bytes: two zero bytes, type 8, number of dimensions, sizes as big-endian integers, content."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is truncated or damaged, download it again: {error}") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is no idx file of {dimensions}-dimensional bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) - header != int(np.prod(shape, dtype=object)):
        raise DataError(f"{path} is truncated: {len(content) - header} bytes for shape {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
