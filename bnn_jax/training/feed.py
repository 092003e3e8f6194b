"""Handing images to compiled programs: from memory on the devices by index, or read and decoded as they are needed.

A program gets ``arrays`` (images and labels held on the devices, or None) and, for every batch, ``rows``: the indices
of its images, or the images and labels themselves. ``fetch`` turns the two into images and labels, inside the program.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from bnn_jax.data.memory import Split
from bnn_jax.data.order import sequential_plan
from bnn_jax.data.stream import StreamedSplit
from bnn_jax.training.devices import Devices

# Indices (N,), or images (N, H, W, C) and labels (N,).
Rows = jax.Array | tuple[jax.Array, jax.Array]


def fetch(images: jax.Array | None, labels: jax.Array | None, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Images uint8 (N, H, W, C) and labels int32 (N,) of a batch; to be used inside a compiled program.

    Args:
      images: (M, H, W, C), all images, or None where the rows bring theirs.
      labels: (M,), or None.
      rows: the batch.
    """
    if isinstance(rows, tuple):
        return rows
    assert images is not None and labels is not None  # whoever hands over indices has placed what they point to
    return images[rows], labels[rows]


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """What one call of the training program takes.

    Attributes:
      rows: of K steps, (K, N).
      mask: bool (K, N).
      steps: K.
      images: number of valid rows.
    """

    rows: Any
    mask: Any
    steps: int
    images: int


class Feed:
    """The images of a split, for programs that run on some devices.

    Args:
      split: in memory, or read when needed.
      devices: placement.
      workers: processes that read images; 0: threads of this process. Of no use for images in memory.

    Attributes:
      streamed: whether images are read when they are needed.
      arrays: images and labels on the devices, or (None, None).
    """

    def __init__(self, split: Split | StreamedSplit, devices: Devices, *, workers: int = 0):
        self._split, self._devices, self._workers = split, devices, workers
        self.streamed = isinstance(split, StreamedSplit)
        self.arrays: tuple[Any, Any] = (None, None)
        if isinstance(split, Split):
            self.arrays = devices.replicate((split.images, split.labels))

    def __len__(self) -> int:
        return len(self._split)

    def batches(
        self, batch_size: int, *, images: np.ndarray | None = None, split_rows: bool = True
    ) -> Iterator[tuple[Any, Any]]:
        """Rows and mask of one batch after another, in order, for evaluation.

        Args:
          batch_size: images of a batch; the last, partial one is filled up and masked, no image is left out.
          images: int32 (M,), which images; None: all.
          split_rows: whether the batch is divided among the devices; else every device gets all of it.
        """
        count = len(self) if images is None else len(images)
        indices, mask = sequential_plan(count, min(batch_size, count))
        indices = indices if images is None else images.astype(np.int32)[indices]
        sharding, own = self._devices.replicated, slice(None)
        if split_rows:
            indices, mask = self._devices.pad_rows(indices, mask)
            sharding, own = self._devices.rows, self._devices.own_columns(indices.shape[1])
        read = self._read(indices[:, own])
        for rows, valid in zip(indices if read is None else read, mask, strict=True):
            yield self._place(rows, sharding), self._devices.split(valid, sharding)

    def dispatches(
        self,
        indices: np.ndarray,
        mask: np.ndarray,
        *,
        first: int = 0,
        length: int = 1,
        parts: int = 1,
        random_crops: tuple[int, int] | None = None,
    ) -> Iterator[Dispatch]:
        """The steps of an epoch in groups, for training.

        Args:
          indices: int32 (S, ..., N), images of each step of the epoch.
          mask: bool (S, ..., N), False for rows that only fill up the batch.
          first: step of the epoch to begin with.
          length: steps of a group, of streamed images 1. Groups end at its multiples and at the end of the epoch, so
            that programs of at most two lengths are needed wherever it begins.
          parts: parts of a batch that pass through the network one after another.
          random_crops: (seed, epoch) of the random crops of streamed images.
        """
        length = 1 if self.streamed else length
        indices, mask = self._devices.pad_rows(indices, mask, parts=parts)
        sharding, own = self._devices.stacked_rows, self._devices.own_columns(indices.shape[-1])
        read = self._read(indices[first:, own], random_crops=random_crops) if self.streamed else None
        begin = first
        while begin < len(indices):
            end = min((begin // length + 1) * length, len(indices))
            rows = indices[begin:end] if read is None else jax.tree.map(lambda part: part[None], next(read))
            yield Dispatch(
                rows=self._place(rows, sharding),
                mask=self._devices.split(mask[begin:end], sharding),
                steps=end - begin,
                images=int(mask[begin:end].sum()),
            )
            begin = end

    def _read(self, indices: np.ndarray, *, random_crops: tuple[int, int] | None = None) -> Iterator[Any] | None:
        """Images and labels of this process's part of each batch; None for images in memory."""
        if not isinstance(self._split, StreamedSplit):
            return None
        return iter(self._split.batches(indices, random_crops=random_crops, workers=self._workers))

    def _place(self, rows: Any, sharding: NamedSharding) -> Any:
        if isinstance(rows, tuple):
            return tuple(self._devices.split_local(part, sharding) for part in rows)
        return self._devices.split(rows, sharding)
