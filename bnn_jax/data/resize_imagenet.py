"""Writes ImageNet as resized pixels, see ``resized``. TensorFlow is not needed.

The images come from a TFDS folder or from ``train/<wnid>/`` and ``val/<wnid>/``. A shard is the unit of work: each is
written by one process, under another name until it is complete. What is finished lies in a hidden folder until all is,
so that the same command goes on where an earlier one stopped.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bnn_jax.data import crops, imagenet, resized
from bnn_jax.data.order import Purpose, permutation
from bnn_jax.data.streaming import Records, corrupt_image
from bnn_jax.errors import DataError

# About 280 MB; what is lost when writing is interrupted is at most a shard of each process.
IMAGES_PER_SHARD = 1024
# Raw pixels: to compress them would save little and cost reading time.
WRITER_OPTIONS = "group_size:1,uncompressed"
SUFFIXES = (".jpeg", ".jpg", ".png")
FOLDERS = {"train": ("train",), "validation": ("val", "validation")}
ACCEPTED = "accepted is a folder with imagenet2012/<version>/ (TFDS), or one with train/<wnid>/ and val/<wnid>/"


class FolderRecords:
    """Pictures in ``<folder>/<wnid>/``, shuffled in an order that is fixed for ever, so that the first ones are mixed.

    Attributes:
      folder: the folder of the class folders.
      split: 'train' or 'validation'.
    """

    def __init__(self, folder: pathlib.Path, split: str, classes: tuple[str, ...]):
        self.folder, self.split = folder, split
        files = list(_image_files(folder, classes))
        order = permutation(0, resized.SPLITS.index(split), purpose=Purpose.STORED_ORDER, size=len(files))
        self._files = [files[index] for index in order]

    def __len__(self) -> int:
        return len(self._files)

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def description(self) -> str:
        """Names and labels of all files, in the stored order."""
        return json.dumps([self.split, self._files])

    def read(self, numbers: list[int]) -> list[tuple[bytes | np.ndarray, int]]:
        """See ``streaming.Records``."""
        try:
            return [((self.folder / name).read_bytes(), label) for name, label in map(self._files.__getitem__, numbers)]
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """See ``streaming.Records``."""
        return np.array([self._files[number][1] for number in numbers], np.int32)

    def file_of(self, number: int) -> str:
        """The path of a picture."""
        return str(self.folder / self._files[number][0])


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A shard to be written.

    Attributes:
      split: 'train' or 'validation'.
      first: number of its first image.
      last: number after that of its last image.
      path: where it is written.
      side: length of the images' shorter side in pixels.
    """

    split: str
    first: int
    last: int
    path: pathlib.Path
    side: int


def prepare(
    source: pathlib.Path, data_dir: pathlib.Path, *, side: int = 256, workers: int = 1, bar: Any
) -> tuple[pathlib.Path, dict[str, int]]:
    """Reads ImageNet and writes it as resized pixels.

    Args:
      source: a folder of prepared data sets with imagenet2012, or one with train/<wnid>/ and val/<wnid>/.
      data_dir: folder of prepared data sets, where ``imagenet2012_resized/<side>/`` is made.
      side: length of the images' shorter side in pixels.
      workers: number of processes; 1 works in this one.
      bar: a rich progress bar.

    Returns:
      The new folder, and the number of images of each split.

    Raises:
      DataError: the source is not usable, an image is damaged, or the folder is there already.
    """
    target = _checked_target(data_dir, side)
    records = open_source(source)
    temporary = target.parent / f".{side}-being-prepared-{_digest(records)}"
    temporary.mkdir(parents=True, exist_ok=True)
    tasks = [task for split in resized.SPLITS for task in _tasks(split, len(records[split]), temporary, side)]
    try:
        shards = _write_all(records, tasks, workers, bar)
        _write_index(records, tasks, shards, temporary)
        os.rename(temporary, target)
    except OSError as error:
        raise DataError(f"writing to {temporary} failed: {' '.join(str(error).split())}") from error
    return target, {split: len(records[split]) for split in resized.SPLITS}


def open_source(source: pathlib.Path) -> dict[str, Any]:
    """The pictures of both splits.

    Raises:
      DataError: it is no folder of ImageNet, or has a file or class that does not belong there.
    """
    if any(source.glob(f"{imagenet.NAME}/*/dataset_info.json")):
        return {split: imagenet.open_tfds(split, str(source)) for split in resized.SPLITS}
    found = {
        split: next((source / name for name in names if (source / name).is_dir()), None)
        for split, names in FOLDERS.items()
    }
    if None in found.values():
        raise DataError(f"--source {source} holds no ImageNet: {ACCEPTED}")
    classes = imagenet.official_classes()
    return {split: FolderRecords(folder, split, classes) for split, folder in found.items() if folder is not None}


def _checked_target(data_dir: pathlib.Path, side: int) -> pathlib.Path:
    if side < 1:
        raise DataError(f"--side {side}: accepted is 1 or more")
    if data_dir.exists() and not data_dir.is_dir():
        raise DataError(f"--data_dir {data_dir} is a file: accepted is a folder")
    target = resized.folder_of(str(data_dir), side)
    if target.exists():
        raise DataError(f"{target} exists already: remove it to prepare it anew, or choose another --data_dir")
    return target


def _image_files(folder: pathlib.Path, classes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Path below the folder and label of every picture, class after class."""
    labels = {wnid: label for label, wnid in enumerate(classes)}
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} is empty: {ACCEPTED}")
    for wnid in names:
        if wnid not in labels or not (folder / wnid).is_dir():
            raise DataError(
                f"{folder / wnid} is no class of ImageNet: accepted are folders {classes[0]} to {classes[-1]}"
            )
        for name in sorted(entry.name for entry in os.scandir(folder / wnid) if not entry.name.startswith(".")):
            if not name.lower().endswith(SUFFIXES):
                raise DataError(f"{folder / wnid / name} is no image: accepted are {', '.join(SUFFIXES)}")
            yield f"{wnid}/{name}", labels[wnid]


def _versions() -> dict[str, str]:
    import PIL

    return {"pillow": PIL.__version__, "python": platform.python_version(), "numpy": np.__version__}


def _digest(records: dict[str, Any]) -> str:
    """Part of the name of the hidden folder: shards of other images, or of another Pillow, are not gone on with."""
    parts = [records[split].description for split in resized.SPLITS]
    content = json.dumps([resized.FORMAT, IMAGES_PER_SHARD, _versions()["pillow"], *parts])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _tasks(split: str, count: int, folder: pathlib.Path, side: int) -> Iterator[ShardTask]:
    shards = -(-count // IMAGES_PER_SHARD)
    for shard in range(shards):
        first = shard * IMAGES_PER_SHARD
        path = folder / f"{split}.array_record-{shard:05d}-of-{shards:05d}"
        yield ShardTask(split, first, min(first + IMAGES_PER_SHARD, count), path, side)


def _write_all(records: dict[str, Any], tasks: list[ShardTask], workers: int, bar: Any) -> list[dict[str, Any]]:
    """What is to be known of each shard, after all are written."""
    progress = bar.add_task("Resizing", total=sum(task.last - task.first for task in tasks))
    entries: dict[ShardTask, dict[str, Any]] = {}
    with _pool(records, workers) as run:
        for task, entry in run(tasks):
            entries[task] = entry
            bar.update(progress, advance=task.last - task.first)
    return [entries[task] for task in tasks]


@contextlib.contextmanager
def _pool(records: dict[str, Any], workers: int) -> Iterator[Callable[[list[ShardTask]], Iterator[Any]]]:
    """A function that writes shards and gives each with its entry as soon as it is done."""
    if workers <= 1:
        yield lambda tasks: ((task, write_shard(records[task.split], task)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _keep_records, (records,))

    def run(tasks: list[ShardTask]) -> Iterator[Any]:
        futures = {pool.submit(_write_kept, task): task for task in tasks}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


# In the processes of the pool: handed over once and not with every shard.
_kept: dict[str, Any] = {}


def _keep_records(records: dict[str, Any]) -> None:
    _kept.update(records)


def _write_kept(task: ShardTask) -> dict[str, Any]:
    return write_shard(_kept[task.split], task)


def write_shard(records: Records, task: ShardTask) -> dict[str, Any]:
    """Writes a shard, unless an earlier program has; returns file name, count, size, SHA-256 and labels.

    Raises:
      DataError: an image is damaged, or writing failed.
    """
    done = task.path.with_name(task.path.name + ".json")
    if done.exists():
        entry = json.loads(done.read_text())
        if task.path.is_file() and task.path.stat().st_size == entry["size"]:
            return entry
    partial = task.path.with_name(f"{task.path.name}.part-{os.getpid()}")
    try:
        labels = _write_records(records, task, partial)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entry = {"file": task.path.name, "count": len(labels), "size": partial.stat().st_size, "sha256": digest}
        entry["labels"] = labels
        os.replace(partial, task.path)
        partial.write_text(json.dumps(entry))
        os.replace(partial, done)
    except (OSError, RuntimeError) as error:  # array_record's writer raises RuntimeError, also for a full disk
        raise DataError(f"writing to {task.path.parent} failed: {' '.join(str(error).split())}") from error
    finally:
        partial.unlink(missing_ok=True)
    return entry


def _write_records(records: Records, task: ShardTask, path: pathlib.Path) -> list[int]:
    from array_record.python.array_record_module import ArrayRecordWriter

    labels = []
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for number in range(task.first, task.last):
            ((content, label),) = records.read([number])
            writer.write(resized.encode(_resized_pixels(records, number, content, task.side), label))
            labels.append(label)
    finally:
        writer.close()
    return labels


def _resized_pixels(records: Records, number: int, content: bytes | np.ndarray, side: int) -> np.ndarray:
    try:
        return np.asarray(crops.resize_shorter_side(crops.decode(content), side))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        what = records.file_of(number) if isinstance(records, FolderRecords) else f"{records.name}, image {number}"
        raise corrupt_image(what, error) from error


def _write_index(
    records: dict[str, Any], tasks: list[ShardTask], shards: list[dict[str, Any]], folder: pathlib.Path
) -> None:
    """The labels' files and the index; then nothing else is left in the folder."""
    splits = {}
    for split in resized.SPLITS:
        entries = [dict(entry) for task, entry in zip(tasks, shards) if task.split == split]
        labels = np.concatenate([np.array(entry.pop("labels"), np.int32) for entry in entries])
        path = folder / resized.labels_file(split)
        np.save(path, labels)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        splits[split] = {"count": len(labels), "labels_sha256": digest, "shards": entries}
    index = {
        "format": resized.FORMAT,
        "side": tasks[0].side,
        "source": {split: hashlib.sha256(records[split].description.encode()).hexdigest() for split in resized.SPLITS},
        "versions": _versions(),
        "splits": splits,
    }
    (folder / resized.INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if ".array_record-" in path.name and (path.suffix == ".json" or ".part-" in path.name):
            path.unlink()
