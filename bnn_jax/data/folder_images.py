"""The images of a folder of pictures, of any size and format.

They are decoded once into memory where they find room there, else read while training; the images are the same.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bnn_jax.data.augment import RANDOM_CROPS, opencv
from bnn_jax.data.folder import FolderRecords, Found, find
from bnn_jax.data.memory import ImageSource, Normalization, Split, limit
from bnn_jax.data.stream import PIECE, PieceReader, StreamedSplit, available_cores, decoding, read_ahead
from bnn_jax.errors import DataError
from bnn_jax.picture_files import EVALUATION_MARGIN, open_picture
from bnn_jax.stages import DataSpec

MEMORY_LIMIT = 2**30  # bytes of decoded images
# Training pictures whose pixels give mean and standard deviation.
MOST_MEASURED = 10_000
MOST_CLASSES_LISTED = 10


def load(
    spec: DataSpec,
    data_dir: str | None,
    *,
    progress: bool,
    image_size: int,
    test_fraction: float,
    seed: int,
    normalization: Normalization | None,
) -> ImageSource:
    """The pictures of a folder; its classes are the folders in ``train``, in alphabetical order.

    Args:
      spec: how many images are asked for, and how they are changed in training.
      data_dir: the folder.
      progress: not used.
      image_size: side of the images in pixels.
      test_fraction: see ``folder.find``.
      seed: see ``folder.find``.
      normalization: mean and standard deviation of the channels if they are known; pictures that are read while
        training are then not looked at before. None: those of the first training pictures, however many are used.

    Raises:
      DataError: it is no such folder, pictures are damaged, or the decoder is not installed.
    """
    del progress
    if image_size < 1:
        raise DataError(f"config.data.image_size={image_size}: accepted is 1 or more")
    found = find(data_dir, test_fraction=test_fraction, seed=seed)
    streamed = reads_while_training(spec, found, image_size)
    if streamed and spec.decoder == "opencv":
        opencv()
    margin = EVALUATION_MARGIN if spec.augment == RANDOM_CROPS else 1.0
    records = [FolderRecords(found.root, files, stream=i) for i, files in enumerate((found.train, found.test))]
    train, test = (
        StreamedSplit(of_split, np.arange(count), image_size, spec.decoder, margin, upright=True)
        for of_split, count in zip(records, _counts(spec, found), strict=True)
    )
    notes, damaged = _notes(found, train, test, streamed=streamed), {}
    if streamed and normalization is None:
        _open_all((train, test), damaged)
    splits = (train, test) if streamed else (_in_memory(train, damaged), _in_memory(test, damaged))
    if normalization is None:
        normalization = _measured(splits[0], min(MOST_MEASURED, len(found.train)), train, damaged)
    if damaged:
        more = f", and {len(damaged) - 1} more like it" if len(damaged) > 1 else ""
        raise DataError(f"{next(iter(damaged.values()))}{more}: mend or remove what cannot be read")
    return ImageSource(spec.name, len(found.classes), *splits, *normalization, crop_margin=margin, notes=notes)


def _measured(split: Split | StreamedSplit, count: int, train: StreamedSplit, damaged: dict[str, str]) -> Normalization:
    """Of the first training pictures, some of which may be in memory."""
    if isinstance(split, Split) and len(split) >= count:
        return measure(split.images[:count])
    return measure(image for _, image in _decoded(dataclasses.replace(train, numbers=np.arange(count)), damaged))


def reads_while_training(spec: DataSpec, found: Found, image_size: int) -> bool:
    """Whether the images are cropped from pictures at random, or are too many for the memory."""
    return spec.augment == RANDOM_CROPS or 3 * image_size**2 * sum(_counts(spec, found)) > MEMORY_LIMIT


def _counts(spec: DataSpec, found: Found) -> list[int]:
    """Numbers of training and test images."""
    return [
        limit(f"{found.root} ({split})", key, asked=getattr(spec, key), available=len(getattr(found, split)))
        for split, key in (("train", "num_train"), ("test", "num_eval"))
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Decoder:
    """Decodes ``PIECE`` pictures at once: images, or of one that is damaged what is wrong."""

    reader: PieceReader

    def __call__(self, piece: int) -> list[np.ndarray | str]:
        numbers = self.reader.plan[0, piece * PIECE : (piece + 1) * PIECE].tolist()
        made: list[np.ndarray | str] = []
        for number, (content, _) in zip(numbers, self.reader.records.read(numbers)):
            try:
                made.append(self.reader.image(content, number))
            except DataError as error:
                made.append(str(error))
        return made


def _decoded(split: StreamedSplit, damaged: dict[str, str]) -> Iterator[tuple[int, np.ndarray]]:
    """Positions and images of a split as they are evaluated; lines about others are added to ``damaged``, by name."""
    read, count = _Decoder(split.reader(split.numbers[None])), -(-len(split) // PIECE)
    pieces = read_ahead(read, count, ahead=2 * available_cores(), workers=0, what=split.records.name)
    with contextlib.closing(pieces):
        for piece, images in enumerate(pieces):
            for position, image in enumerate(images, start=piece * PIECE):
                if isinstance(image, str):
                    damaged.setdefault(split.records.name_of(split.numbers[position]), image)
                else:
                    yield position, image


def _in_memory(split: StreamedSplit, damaged: dict[str, str]) -> Split:
    images = np.zeros((len(split), *split.image_shape), np.uint8)
    for position, image in _decoded(split, damaged):
        images[position] = image
    return Split(images, split.labels)


def _open_all(splits: Iterable[StreamedSplit], damaged: dict[str, str]) -> None:
    """Reads the first bytes of all pictures; lines about those that are none are added to ``damaged``, by name."""
    for split in splits:
        for name in map(split.records.name_of, split.numbers.tolist()):
            try:
                with decoding(name), open_picture(name):
                    pass
            except DataError as error:
                damaged.setdefault(name, str(error))


def measure(images: Iterable[np.ndarray]) -> Normalization:
    """Mean and standard deviation of pixels / 255, per channel, to four digits as published constants are.

    Args:
      images: uint8 (H, W, 3) each.
    """
    count, total, squares = 0, np.zeros(3, np.int64), np.zeros(3, np.int64)
    for image in images:
        pixels = image.reshape(-1, 3).astype(np.int64)
        # Integers add up to the same in any order.
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / max(count, 1)
    deviation = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0.0))
    # A channel that never changes is left as it is.
    return Normalization(
        tuple(round(float(value) / 255, 4) for value in mean),
        tuple(round(float(value) / 255, 4) or 1.0 for value in deviation),
    )


def _notes(found: Found, train: StreamedSplit, test: StreamedSplit, *, streamed: bool) -> tuple[str, ...]:
    """What a user wants to know of a folder before training on it."""
    count, side = len(found.classes), train.image_size
    size = f"{3 * side**2 * (len(train) + len(test)) / 2**20:,.1f} MiB; up to {MEMORY_LIMIT / 2**20:,.0f} fit there"
    where = "read while training" if streamed else "decoded once into memory"
    lines = [
        f"{found.root}: {len(train):,} training and {len(test):,} test pictures of {count} classes, at {side}x{side} "
        f"{where} ({'cropped at random' if train.margin != 1 else size})",
        _balance(found.classes, np.bincount(train.labels, minlength=count)),
    ]
    missing = np.flatnonzero(np.bincount(test.labels, minlength=count) == 0)
    if len(missing):
        names = _first_of([found.classes[label] for label in missing])
        lines.append(f"no test picture of {names}: how well such pictures are recognised remains unknown")
    if found.foreign:
        lines.append(f"left out, since they are no pictures: {_first_of(found.foreign)}")
    return tuple(lines)


def _balance(classes: Sequence[str], counts: np.ndarray) -> str:
    low, high = int(counts.argmin()), int(counts.argmax())
    listed = ", ".join(f"{name} {number:,}" for name, number in zip(classes, counts.tolist()))
    if len(classes) > MOST_CLASSES_LISTED:
        listed = f"{counts[low]:,} ({classes[low]}) to {counts[high]:,} ({classes[high]})"
    ratio = counts[high] / max(counts[low], 1)
    uneven = f"; {classes[high]} has {ratio:.1f} times as many as {classes[low]}" if ratio >= 1.5 else ""
    return f"training pictures of each class: {listed}{uneven}"


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
