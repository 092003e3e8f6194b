"""Images that are read and decoded while training: too many to lie in memory.

``StreamedSplit`` is to them what ``memory.Split`` is to images in memory. Whoever trains passes the plan, the numbers
of the images of each batch, and gets the batches in that order; grain reads ahead, by threads of this process or by
processes of its own. What an image looks like depends on the seed, the epoch and the image's own number alone: it is
the same whatever the number of threads, processes and hosts, and wherever in an epoch one begins.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
import typing
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from bnn_jax.data.augment import NUM_DRAWS, training_image
from bnn_jax.data.order import Purpose, random_bits
from bnn_jax.errors import DataError
from bnn_jax.picture_files import EVALUATION_MARGIN, evaluation_image

# Images read at once by a thread or process: so many that handing them on costs little beside decoding them, so few
# that a thread or process which is asked to stop has soon read its last one.
PIECE = 16
BATCHES_AHEAD = 2
GRACE_SECONDS = 5.0
WORKER_ENDED = "Worker process was terminated"  # how grain begins its message

# Images uint8 (n, H, W, C) and labels int32 (n,).
Batch = tuple[np.ndarray, np.ndarray]


class Records(typing.Protocol):
    """Stored pictures and their labels, by number; copies of it go to the processes that read."""

    @property
    def name(self) -> str:
        """Name of the data set, the split and its folder, for messages."""
        ...

    @property
    def description(self) -> str:
        """What distinguishes these records from others: files, counts and sizes."""
        ...

    def __len__(self) -> int: ...

    def name_of(self, number: int) -> str:
        """Name of a picture, for messages."""
        ...

    def read(self, numbers: Sequence[int]) -> list[tuple[bytes, int]]:
        """The bytes of a picture's file and its label, for each number.

        Raises:
          DataError: a record is damaged.
        """
        ...

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """Labels int32 (N,) of the records; what was read once is kept."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedSplit:
    """Images of a split, read when needed.

    Attributes:
      records: all stored pictures of the split.
      numbers: int (N,), the records that are this split's images.
      image_size: side of the images in pixels.
      decoder: what decodes training images, 'pillow' or 'opencv'.
      margin: how much larger than the image a picture is resized before its middle is evaluated.
      upright: whether pictures are turned as their files say that the camera was held.
    """

    records: Records
    numbers: np.ndarray
    image_size: int
    decoder: str = "pillow"
    margin: float = EVALUATION_MARGIN
    upright: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images of ``batches``."""
        return self.image_size, self.image_size, 3

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 (N,), in [0, number of classes); the first call may read all records."""
        return self.records.labels(self.numbers)

    def take(self, indices: np.ndarray) -> "StreamedSplit":
        """The images at ``indices``, integers or a mask (N,), in that order."""
        return dataclasses.replace(self, numbers=self.numbers[indices])

    def update_digest(self, digest: Any) -> None:
        """Adds the description of the records, which of them are used, and the images' size to a digest."""
        other = "" if self.margin == EVALUATION_MARGIN and not self.upright else f" {self.margin} {self.upright}"
        digest.update(f"{self.records.description} {self.image_size}{other};".encode())
        digest.update(np.ascontiguousarray(self.numbers, "<i8").data)

    def batches(
        self, indices: np.ndarray, *, random_crops: tuple[int, int] | None = None, workers: int = 0
    ) -> Generator[Batch, None, None]:
        """Batches in the order of a plan. Closing the iterator, or leaving its loop, ends all reading.

        Args:
          indices: int (S, n), the images of each batch, in [0, N).
          random_crops: (seed, epoch) of random resized crops; None gives the images as they are evaluated, resized and
            cropped at the centre. A crop is a pure function of seed, epoch and the image's record number.
          workers: number of processes that read; 0 reads in threads of this process.

        Yields:
          For each row, images uint8 (n, H, W, C) and labels int32 (n,).

        Raises:
          ValueError: the plan is no (S, n) array of images of this split.
          DataError: an image is damaged, or a process that reads was killed.
        """
        if indices.ndim != 2 or (indices.size and not 0 <= indices.min() <= indices.max() < len(self)):
            raise ValueError(f"plan of shape {indices.shape} for {len(self)} images: expected (S, n) of their indices")
        if workers < 0:
            raise ValueError(f"workers {workers}: accepted is 0 or more")
        return _batches(self.reader(self.numbers[indices], random_crops), workers)

    def reader(self, plan: np.ndarray, random_crops: tuple[int, int] | None = None) -> "PieceReader":
        """Reads the records that a plan, int (S, n), names."""
        how = (self.image_size, self.decoder, random_crops, self.margin, self.upright)
        return PieceReader(self.records, plan, *how)


@dataclasses.dataclass(frozen=True, eq=False)
class PieceReader:
    """Reads part of a row of the plan; the unit of work of a thread or process.

    Attributes:
      records: the stored pictures.
      plan: int (S, n), record numbers.
      image_size: side of the images in pixels.
      decoder: what decodes training images.
      random_crops: seed and epoch of random crops, or None for evaluation.
      margin: how much larger a picture is resized before its middle is evaluated.
      upright: whether pictures are turned as their files say.
    """

    records: Records
    plan: np.ndarray
    image_size: int
    decoder: str
    random_crops: tuple[int, int] | None
    margin: float = EVALUATION_MARGIN
    upright: bool = False

    @property
    def pieces_per_row(self) -> int:
        """Number of pieces of a row; the last one of a row may be smaller than the others."""
        return -(-self.plan.shape[1] // PIECE)

    def __call__(self, piece: int) -> Batch:
        """Images uint8 (m, H, W, 3) and labels int32 (m,) of a piece, counted over all rows."""
        row, part = divmod(int(piece), self.pieces_per_row)
        numbers = self.plan[row, part * PIECE : (part + 1) * PIECE].tolist()
        images = np.empty((len(numbers), self.image_size, self.image_size, 3), np.uint8)
        labels = np.empty(len(numbers), np.int32)
        for position, (content, label) in enumerate(self.records.read(numbers)):
            images[position] = self.image(content, numbers[position])
            labels[position] = label
        return images, labels

    def image(self, content: bytes, number: int) -> np.ndarray:
        """The image, uint8 (H, W, 3), of a record's content.

        Raises:
          DataError: it is damaged.
        """
        with decoding(self.records.name_of(number)):
            if self.random_crops is None:
                return evaluation_image(content, self.image_size, margin=self.margin, upright=self.upright)
            seed, epoch = self.random_crops
            bits = random_bits(seed, epoch, purpose=Purpose.CROP, count=NUM_DRAWS, item=number)
            return training_image(content, self.image_size, bits, decoder=self.decoder, upright=self.upright)


@contextlib.contextmanager
def decoding(what: str) -> Generator[None, None, None]:
    """Turns what a decoder raises into the one line that says which picture could not be decoded, and why."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of the decoders, which raise OSError, SyntaxError, ValueError, cv2.error and more
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{what}: the image is corrupt ({reason})") from error


def _batches(reader: PieceReader, workers: int) -> Generator[Batch, None, None]:
    rows, per_row = len(reader.plan), reader.pieces_per_row
    # Threads and processes read pieces rather than batches, so that the first batch is there after one batch's work
    # and not after as many as there are threads, and so that all of them stop soon.
    pieces = read_ahead(
        reader, rows * per_row, ahead=BATCHES_AHEAD * per_row, workers=workers, what=reader.records.name
    )
    with contextlib.closing(pieces):
        for _ in range(rows):
            images, labels = zip(*(next(pieces) for _ in range(per_row)))
            yield (images[0], labels[0]) if per_row == 1 else (np.concatenate(images), np.concatenate(labels))


def read_ahead(
    read: Callable[[int], Any], count: int, *, ahead: int, workers: int, what: str
) -> Generator[Any, None, None]:
    """``read(0)`` to ``read(count - 1)``, in this order, computed ahead of time. Closing it ends all reading.

    Args:
      read: called by threads; copies of it by processes.
      count: number of calls.
      ahead: number of results that are read before they are asked for, besides those being worked on.
      workers: number of processes; 0 reads in threads of this process.
      what: name of what is read, for messages.

    Raises:
      DataError: raised by ``read``, or a process was killed.
    """
    if not count:
        return
    iterator = iter(_pipeline(read, count, ahead, workers))
    try:
        # Asked for one more, or closed by ``yield from``, grain's iterator would wait for its processes to end.
        for _ in range(count):
            yield next(iterator)
    except DataError as error:
        # Without the frames and notes of the threads and processes it came through.
        raise DataError(str(error)) from None
    except RuntimeError as error:
        if WORKER_ENDED not in str(error):
            raise
        raise DataError(
            f"{what}: a process that reads images was ended from outside; if memory was short, fewer workers need "
            "less (config.data.workers)"
        ) from error
    finally:
        _close(iterator)


def _pipeline(read: Callable[[int], Any], count: int, ahead: int, workers: int) -> Any:
    """A grain dataset of what is read."""
    import grain

    _parse_no_flags()
    pieces = grain.MapDataset.range(count).map(read)
    if workers:
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-ahead // workers))
        # No further threads within a process.
        in_line = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return pieces.to_iter_dataset(in_line).mp_prefetch(processes, worker_init_fn=_start_worker)
    threads = min(available_cores(), ahead)
    return pieces.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead + threads))


def available_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parse_no_flags() -> None:
    """Where no program has parsed absl's flags, their defaults hold: grain's processes ask for its own flags."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _close(iterator: Any) -> None:
    """Ends reading, and waits for it, but not long: processes of grain listen only after they have come up."""
    # No daemon: the end of the program waits for it, where grain would otherwise close the same iterator once more.
    closing = threading.Thread(target=iterator.close, name="close-input")
    closing.start()
    closing.join(timeout=0.5)


def _start_worker(index: int, count: int) -> None:
    """What a reading process does first; whether it lives on is for the process that trains to say."""
    del index, count
    # Ctrl-C and a batch system's SIGTERM reach every process of a job. The one that trains saves its state first, and
    # may wait for a batch until it notices.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _exit_after(GRACE_SECONDS))
    parent = multiprocessing.parent_process()
    if parent is not None:
        # One that is killed cannot say anything; its readers would wait for ever.
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _exit_with(process: Any) -> None:
    with contextlib.suppress(Exception):
        process.join()
    os._exit(0)
