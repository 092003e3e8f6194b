"""Folds of a split of images: which images a candidate is judged by, and which are left to judge the winner by."""

import dataclasses

import numpy as np

from bnn_jax.errors import DataError

KINDS = ("contiguous", "stratified")


@dataclasses.dataclass(frozen=True, eq=False)
class Folds:
    """Images of each fold.

    Attributes:
      fold: int (N,), the fold an image belongs to; -1 for images of no fold.
      count: number of folds.
    """

    fold: np.ndarray
    count: int

    def images(self, index: int) -> np.ndarray:
        """Images of a fold, rising int32."""
        return np.flatnonzero(self.fold == index).astype(np.int32)

    def others(self, index: int) -> np.ndarray:
        """All images outside of a fold, those of no fold too, rising int32."""
        return np.flatnonzero(self.fold != index).astype(np.int32)


def make_folds(labels: np.ndarray, *, kind: str, count: int, batch_size: int) -> Folds:
    """Divides images into folds.

    'contiguous', as released: the images sorted by class (in their order within a class) are cut into batches, and fold
    f holds the batches f*m to (f+1)*m - 1, m = number of batches // count. A fold then holds only some of the classes.
    Batches left over belong to no fold.

    'stratified': the images of each class are dealt to the folds in turn; every fold holds every class.

    Args:
      labels: int (N,).
      kind: 'contiguous' or 'stratified'.
      count: number of folds, 2 or more.
      batch_size: images per batch of the contiguous kind.

    Raises:
      DataError: too few images, or an unknown kind.

    Reference: release: HanByulKim/BASQ: 02kfold_evolution.py, whose image folder is sorted by class.
    """
    if kind not in KINDS:
        raise DataError(f"kind of folds {kind!r}: accepted are {', '.join(KINDS)}")
    by_class = np.argsort(labels, kind="stable")
    fold = np.full(len(labels), -1)
    if kind == "stratified":
        fold[by_class] = np.arange(len(labels)) % count
        fewest = len(labels) // count
    else:
        batches = -(-len(labels) // batch_size)
        fewest = batches // count
        number = np.arange(len(labels)) // batch_size // max(fewest, 1)
        fold[by_class] = np.where(number < count, number, -1)
    if count < 2 or fewest < 1:
        what = "images" if kind == "stratified" else f"images in batches of {batch_size}"
        raise DataError(f"{count} folds of {len(labels)} {what}: accepted are 2 folds or more, none of them empty")
    return Folds(fold, count)
