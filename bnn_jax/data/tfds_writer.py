"""Writes a TFDS folder without TensorFlow: the stock builder with another source of images.

The folder has the stock features, names and version, so ``tfds.data_source`` reads it wherever TFDS is installed. The
same images give the same bytes.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from bnn_jax.data import tfds_source
from bnn_jax.data.base import LoadRequest
from bnn_jax.data.downloads import Download, DownloadedSplit
from bnn_jax.errors import DataError


def target_folder(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The folder that ``write`` makes, ``<data_dir>/<name>/<version>``.

    Raises:
      DataError: it is there already, or no folder can be made there.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise DataError(f"--data_dir {data_dir} is a file: accepted is a folder")
    folder = data_dir / name / str(_stock_builder(name).VERSION)
    if folder.exists():
        raise DataError(f"{folder} exists already: remove it to prepare {name} anew, or choose another --data_dir")
    return folder


def write(name: str, download: Download, data_dir: pathlib.Path, *, bar: Any) -> pathlib.Path:
    """Writes both splits, reads them back and compares, then moves the folder to its place.

    Until then everything lies in a hidden folder beside it, which is removed if anything fails.

    Args:
      name: 'cifar10', 'cifar100' or 'mnist'.
      download: the images.
      data_dir: folder of prepared data sets; made if it is not there.
      bar: a rich progress bar.

    Returns:
      The new folder.

    Raises:
      DataError: the folder is there already, or writing failed.
    """
    target = target_folder(name, data_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}-being-prepared-", dir=data_dir))
    try:
        _build(name, download, temporary, bar)
        _check(name, download, temporary, bar)
        # Renaming replaces an empty folder only: nobody's data is lost if two programs prepare at once.
        os.rename(temporary / name / target.name, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            target.parent.rmdir()  # Succeeds only if it is empty, after a failure.
    return target


def encode_image(image: np.ndarray) -> bytes:
    """PNG of a uint8 image (H, W, 3) or (H, W, 1)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _stock_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_cls(name)


def _build(name: str, download: Download, folder: pathlib.Path, bar: Any) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    builder = _builder_class(name, download, bar)(data_dir=str(folder))
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    output = io.StringIO()
    try:
        with _deterministic_records(), contextlib.redirect_stdout(output):
            builder.download_and_prepare(file_format="array_record", download_config=config)
    except (OSError, RuntimeError) as error:  # array_record's writer raises RuntimeError, also for a full disk
        raise DataError(f"writing to {folder.parent} failed: {' '.join(str(error).split())}") from error


def _builder_class(name: str, download: Download, bar: Any) -> Any:
    """The stock builder, with images from ``download``; its name decides the names of folder and files."""
    stock = _stock_builder(name)

    def split_generators(self: Any, download_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del download_manager
        for feature, names in download.class_names.items():
            self.info.features[feature].names = list(names)
        has_id = "id" in self.info.features
        splits = {"train": download.train, "test": download.test}
        return {key: _examples(key, split, bar, has_id=has_id) for key, split in splits.items()}

    def fill(namespace: dict[str, Any]) -> None:
        # Without a code path TFDS looks for no table of download checksums, which would need importlib_resources.
        namespace.update(name=name, _split_generators=split_generators, code_path=None, __module__=stock.__module__)

    return types.new_class(stock.__name__, (stock,), {"skip_registration": True}, fill)


def _examples(key: str, split: DownloadedSplit, bar: Any, *, has_id: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of key and example as the stock builder makes them, so that TFDS stores the images in the stock order."""
    columns = {feature: labels.tolist() for feature, labels in split.labels.items()}
    for index, image in enumerate(bar.track(split.images, description=f"Writing {key}")):
        example = {"image": encode_image(image), **{feature: labels[index] for feature, labels in columns.items()}}
        yield index, {"id": f"{key}_{index:05d}", **example} if has_id else example


@contextlib.contextmanager
def _deterministic_records() -> Iterator[None]:
    """Makes equal examples equal bytes: protobuf otherwise orders the features differently in every process."""
    from tensorflow_datasets.core import example_serializer

    stock = example_serializer.ExampleSerializer.serialize_example

    def serialize(self: Any, example: Any) -> bytes:
        return self.get_tf_example(example).SerializeToString(deterministic=True)

    example_serializer.ExampleSerializer.serialize_example = serialize
    try:
        yield
    finally:
        example_serializer.ExampleSerializer.serialize_example = stock


def _check(name: str, download: Download, folder: pathlib.Path, bar: Any) -> None:
    """Raises unless the written folder holds exactly the images and labels of ``download``, in whatever order."""
    task = bar.add_task("Checking", total=None)
    loaded = tfds_source.load(name, LoadRequest(data_dir=str(folder)))
    for key, expected, found in (("train", download.train, loaded.train), ("test", download.test, loaded.test)):
        if _digests(expected.images, expected.labels["label"]) != _digests(found.images, found.labels):
            raise DataError(f"the {key} images of {name} were stored wrongly; nothing was prepared in {folder.parent}")
    bar.update(task, total=1, completed=1)


def _digests(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """A sorted list of one digest per image and label: equal for the same images in any order."""
    return sorted(hashlib.sha256(image.tobytes() + bytes([label])).digest() for image, label in zip(images, labels))
