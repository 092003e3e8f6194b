"""Reads what people download: official CIFAR archives, the MNIST files, or a folder of images per class."""

import pathlib
from typing import Any

from bnn_jax.data.downloads import cifar, image_folder, mnist
from bnn_jax.data.downloads.base import Download, DownloadedSplit
from bnn_jax.errors import DataError

__all__ = ["Download", "DownloadedSplit", "read"]


def read(name: str, source: pathlib.Path, *, bar: Any) -> Download:
    """Reads a downloaded data set into memory.

    Args:
      name: 'cifar10', 'cifar100' or 'mnist'.
      source: an official archive (CIFAR); a folder of its unpacked files, or of the four files of MNIST; or a folder
        with the images in ``train/<class>/`` and ``test/<class>/``.
      bar: a rich progress bar.

    Raises:
      DataError: the source is missing, truncated, damaged, hostile or something else.
    """
    if not source.exists():
        accepted = mnist.ACCEPTED if name == "mnist" else cifar.accepted(name)
        raise DataError(f"--source {source} does not exist: accepted is {accepted}")
    if image_folder.is_image_folder(source):
        return image_folder.read(name, source, bar=bar)
    task = bar.add_task(f"Reading {source.name}", total=None)
    download = mnist.read(source) if name == "mnist" else cifar.read(name, source)
    bar.update(task, total=1, completed=1)
    return download
