"""Turns a downloaded data set into the TFDS folder that training reads. TensorFlow is not needed.

    python -m bnn_jax.data.prepare cifar10 --source cifar-10-python.tar.gz --data_dir ~/tensorflow_datasets
    python -m bnn_jax.data.prepare imagenet --source FOLDER --data_dir ~/tensorflow_datasets --workers 16

ImageNet is decoded and resized once, about 360 GB, which the data source 'imagenet2012_resized' reads.

Checksums are compared where they are known. A source that is not the official one is prepared all the same, with a
warning, since archives are also repacked and images kept in folders; ``--official_only`` refuses it. Damaged and
truncated sources are always refused.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
import shutil
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from bnn_jax.data import archives, folder, tfds
from bnn_jax.data.stream import PIECE, Records, available_cores, decoding, read_ahead
from bnn_jax.errors import DataError, UserError
from bnn_jax.picture_files import covering, decode

IMAGENET, DEFAULT_SIDE = "imagenet", 256
RESIZED_VERSION = "1.0.0"
# About 280 MB; a command that is interrupted loses the shards it was writing.
IMAGES_PER_SHARD = 1024


def target_folder(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The folder to be made, ``<data_dir>/<name>/<version>``.

    Raises:
      DataError: it is there already, or no folder can be made there.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise DataError(f"--data_dir {data_dir} is a file: accepted is a folder")
    target = data_dir / name / (RESIZED_VERSION if name == tfds.RESIZED else str(_stock_builder(name).VERSION))
    if target.exists():
        raise DataError(f"{target} exists already: remove it to prepare {name} anew, or choose another --data_dir")
    return target


@contextlib.contextmanager
def writing(place: pathlib.Path) -> Iterator[None]:
    """Turns a full disk and the like into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record's writer raises RuntimeError, also for a full disk
        raise DataError(f"writing to {place} failed: {' '.join(str(error).split())}") from error


def write(name: str, download: archives.Download, data_dir: pathlib.Path, *, progress: bool = False) -> pathlib.Path:
    """Writes the TFDS folder of a download; returns it.

    TFDS's own builder writes it, with another source of images: it has the stock features, names, version and order.
    Until all is complete it lies in a hidden folder, which is removed if anything fails.

    Args:
      name: 'cifar10', 'cifar100' or 'mnist'.
      download: the images.
      data_dir: folder of prepared data sets; made if it is not there.
      progress: whether progress bars are shown on stderr.

    Raises:
      DataError: the folder is there already, or writing failed.
    """
    target = target_folder(name, data_dir)
    with writing(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}-being-prepared-", dir=data_dir))
        try:
            _build(name, download, temporary, progress)
            target.parent.mkdir(exist_ok=True)
            # Renaming replaces an empty folder only: nobody's data is lost if two programs prepare at once.
            os.rename(temporary / name / target.name, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _stock_builder(name: str) -> Any:
    import tensorflow_datasets

    return tensorflow_datasets.builder_cls(name)


def _build(name: str, download: archives.Download, place: pathlib.Path, progress: bool) -> None:
    """Runs the stock builder, with images from ``download``; its name decides the names of folder and files."""
    import tensorflow_datasets

    def split_generators(self: Any, download_manager: Any) -> dict[str, Any]:
        del download_manager
        if name != "mnist":  # whose classes have no names in TFDS
            for feature, names in archives.CLASSES[name].items():
                self.info.features[feature].names = list(names)
        has_id = "id" in self.info.features
        splits = {"train": download.train, "test": download.test}
        return {key: _examples(key, split, has_id=has_id, progress=progress) for key, split in splits.items()}

    stock = _stock_builder(name)
    # Without a code path TFDS looks for no table of download checksums, which would need importlib_resources.
    namespace = {"name": name, "_split_generators": split_generators, "code_path": None, "__module__": stock.__module__}
    builder = types.new_class(
        stock.__name__, (stock,), {"skip_registration": True}, lambda body: body.update(namespace)
    )
    tensorflow_datasets.disable_progress_bar()
    config = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):
        builder(data_dir=str(place)).download_and_prepare(file_format="array_record", download_config=config)


def _examples(key: str, split: archives.DownloadedSplit, *, has_id: bool, progress: bool) -> Iterator[tuple[int, Any]]:
    """Pairs of key and example as the stock builder makes them, so that TFDS stores the images in the stock order."""
    columns = {feature: labels.tolist() for feature, labels in split.labels.items()}
    images = tfds.track(split.images, f"Writing {key}", total=len(split.images), show=progress)
    for index, image in enumerate(images):
        example = {"image": encode_image(image), **{feature: labels[index] for feature, labels in columns.items()}}
        yield index, {"id": f"{key}_{index:05d}", **example} if has_id else example


def encode_image(image: np.ndarray) -> bytes:
    """PNG of a uint8 image (H, W, 3) or (H, W, 1); TFDS itself would ask TensorFlow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def prepare_imagenet(
    source: pathlib.Path, data_dir: pathlib.Path, *, side: int = DEFAULT_SIDE, workers: int = 1, progress: bool = False
) -> tuple[pathlib.Path, dict[str, int]]:
    """Decodes and resizes the pictures of ImageNet, and writes them as a TFDS folder of uncompressed images.

    Until all is complete the shards lie in a hidden folder; the same command goes on with what is finished.

    Args:
      source: a folder of prepared data sets with imagenet2012, or one with train/<wnid>/ and val/<wnid>/.
      data_dir: folder of prepared data sets.
      side: length of the pictures' shorter side in pixels.
      workers: number of processes; 1 works in this one.
      progress: whether progress bars are shown on stderr.

    Returns:
      The new folder, and the number of images of each split.

    Raises:
      DataError: the source is not usable, an image is damaged, or the folder is there already.
    """
    import PIL
    import tensorflow_datasets

    if side < 1:
        raise DataError(f"--side {side}: accepted is 1 or more")
    target = target_folder(tfds.RESIZED, data_dir)
    classes = official_classes()
    splits = open_imagenet(source, classes)
    description = f"ImageNet, shorter side {side} pixels, resized by Pillow {PIL.__version__}"
    # Shards of other pictures, or of another Pillow, are not gone on with.
    parts = [description, str(IMAGES_PER_SHARD), *(records.description for records in splits.values())]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    temporary = data_dir / f".{tfds.RESIZED}-being-prepared-{digest}"
    with writing(temporary):
        temporary.mkdir(parents=True, exist_ok=True)
        infos = [
            _write_split(split, records, temporary, side=side, workers=workers, progress=progress)
            for split, records in splits.items()
        ]
        for leftover in temporary.glob("*.array_record-*.*"):
            leftover.unlink()
        tensorflow_datasets.folder_dataset.write_metadata(
            data_dir=temporary,
            features=_features(names=classes),
            split_infos=infos,
            version=RESIZED_VERSION,
            check_data=False,
            description=f"{description} [{digest}]",
        )
        target.parent.mkdir(exist_ok=True)
        os.rename(temporary, target)
    return target, {split: len(records) for split, records in splits.items()}


def official_classes() -> tuple[str, ...]:
    """The WordNet numbers of the 1,000 classes in the order of their labels ('n01440764' to 'n15075141')."""
    place = _stock_builder("imagenet2012").pkg_dir_path
    assert place is not None  # only a builder outside of TFDS has none
    return tuple((place / "labels.txt").read_text().split())


def open_imagenet(source: pathlib.Path, classes: Sequence[str]) -> dict[str, Records]:
    """The pictures of both splits.

    Raises:
      DataError: it is no folder of ImageNet, or has a file or class that does not belong there.
    """
    names = ("train", "validation")
    if any(source.glob("imagenet2012/*/dataset_info.json")):
        return {split: tfds.open_records("imagenet2012", split, str(source)) for split in names}
    try:
        folders = folder.split_folders(str(source))
    except DataError:
        accepted = "a folder with imagenet2012/<version>/ (TFDS), or one with train/<wnid>/ and val/<wnid>/"
        raise DataError(f"--source {source} holds no ImageNet: accepted is {accepted}") from None
    pictures = [folder.picture_files(place, classes) for place in folders]
    return {names[i]: folder.FolderRecords(folders[i], pictures[i], stream=i) for i in range(2)}


def _features(**classes: Any) -> Any:
    import tensorflow_datasets

    image = tensorflow_datasets.features.Image(shape=(None, None, 3))
    label = tensorflow_datasets.features.ClassLabel(**classes)
    return tensorflow_datasets.features.FeaturesDict({"image": image, "label": label})


@dataclasses.dataclass(frozen=True)
class Resizer:
    """Decodes and resizes ``PIECE`` pictures at once.

    Attributes:
      records: the stored pictures.
      first: number of the first picture of piece 0.
      side: length of the pictures' shorter side in pixels.
    """

    records: Records
    first: int
    side: int

    def __call__(self, piece: int) -> list[tuple[bytes, int]]:
        """The record and the label of each picture."""
        start = self.first + PIECE * int(piece)
        numbers = range(start, min(start + PIECE, len(self.records)))
        features = _features(num_classes=1000)
        made = []
        for number, (content, label) in zip(numbers, self.records.read(numbers)):
            buffer = io.BytesIO()
            with decoding(self.records.name_of(number)):
                covering(decode(content), self.side, self.side).save(buffer, "PPM")
            made.append((features.serialize_example({"image": buffer.getvalue(), "label": label}), label))
        return made


def _write_split(split: str, records: Records, place: pathlib.Path, *, side: int, workers: int, progress: bool) -> Any:
    """Writes the shards that are missing, and the labels of all; returns TFDS's description of the split."""
    import tensorflow_datasets

    count = len(records)
    shards = -(-count // IMAGES_PER_SHARD)
    paths = [place / f"{tfds.RESIZED}-{split}.array_record-{shard:05d}-of-{shards:05d}" for shard in range(shards)]
    done = next((shard for shard, path in enumerate(paths) if not path.exists()), shards)
    first = done * IMAGES_PER_SHARD
    pieces = read_ahead(
        Resizer(records, first, side),
        max(0, -(-(count - first) // PIECE)),
        ahead=2 * workers,
        workers=workers if workers > 1 else 0,
        what=records.name,
    )
    with contextlib.closing(pieces):
        pictures = itertools.chain.from_iterable(pieces)
        for path in tfds.track(paths[done:], f"Resizing {split}", show=progress):
            _write_shard(path, itertools.islice(pictures, IMAGES_PER_SHARD))
    labels = [np.load(_labels_of(path)) for path in paths]
    np.save(place / tfds.labels_file(split), np.concatenate(labels))
    return tensorflow_datasets.core.SplitInfo(
        name=split,
        shard_lengths=[len(of_shard) for of_shard in labels],
        num_bytes=sum(path.stat().st_size for path in paths),
    )


def _labels_of(shard: pathlib.Path) -> pathlib.Path:
    return shard.with_name(f"{shard.name}.labels.npy")


def _write_shard(path: pathlib.Path, pictures: Iterable[tuple[bytes, int]]) -> None:
    """Writes a file of records and their labels; the file has its name when both are complete."""
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = path.with_name(f"{path.name}.{os.getpid()}")
    labels = []
    # Raw pixels: to compress them would save little and cost reading time.
    writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    try:
        for record, label in pictures:
            writer.write(record)
            labels.append(label)
    finally:
        writer.close()
    np.save(_labels_of(path), np.array(labels, np.int32))
    os.replace(partial, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for a mistake the user can mend."""
    options = _parser().parse_args(arguments)
    data_dir = pathlib.Path(options.data_dir).expanduser().absolute()
    source = pathlib.Path(options.source).expanduser()
    try:
        return (_main_imagenet if options.name == IMAGENET else _main_resident)(options, source, data_dir)
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = (
            "the same command goes on with what is finished" if options.name == IMAGENET else "nothing was prepared"
        )
        print(f"interrupted: {goes_on}", file=sys.stderr)
        return 130


def _main_imagenet(options: argparse.Namespace, source: pathlib.Path, data_dir: pathlib.Path) -> int:
    if options.official_only:
        raise DataError("--official_only: no checksum of ImageNet is known; leave it out")
    workers = available_cores() if options.workers is None else options.workers
    if workers < 1:
        raise DataError(f"--workers {workers}: accepted is 1 or more")
    target, counts = prepare_imagenet(
        source, data_dir, side=options.side, workers=workers, progress=sys.stderr.isatty()
    )
    images = f"{counts['train']} training and {counts['validation']} validation images"
    flags = f"--config.data.name={tfds.RESIZED} --config.data.data_dir={data_dir}"
    print(f"imagenet: {images} in {target}; train on them with {flags}")
    return 0


def _main_resident(options: argparse.Namespace, source: pathlib.Path, data_dir: pathlib.Path) -> int:
    if (options.workers, options.side) != (None, DEFAULT_SIDE):
        raise DataError(f"--workers and --side: accepted with {IMAGENET} only")
    target_folder(options.name, data_dir)  # Before minutes are spent on reading.
    progress = sys.stderr.isatty()
    download = archives.read(options.name, source, progress=progress)
    if options.official_only and download.unofficial:
        raise DataError(f"{download.unofficial} (refused because of --official_only)")
    target = write(options.name, download, data_dir, progress=progress)
    if download.unofficial:
        print(f"warning: {download.unofficial}", file=sys.stderr)
    counts = f"{len(download.train.images)} training and {len(download.test.images)} test images"
    print(f"{options.name}: {counts} in {target}; train on them with --config.data.data_dir={data_dir}")
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bnn_jax.data.prepare",
        description="Turns a downloaded data set into the folder that training reads, without TensorFlow.",
        epilog="The CIFAR archives: https://www.cs.toronto.edu/~kriz/cifar.html. Nothing is downloaded. ImageNet takes "
        "about 360 GB; a command that is interrupted goes on with what is finished when it is given again.",
    )
    parser.add_argument("name", choices=sorted((*archives.CLASSES, IMAGENET)), help="the data set")
    parser.add_argument(
        "--source",
        required=True,
        help="CIFAR: the official archive (cifar-10-python.tar.gz, cifar-10-binary.tar.gz, cifar-100-...) or the "
        "folder of its files; MNIST: the folder of its four files; or a folder of images, train/<class>/*.png and "
        "test/<class>/*.png; ImageNet: a folder of prepared data sets with imagenet2012 (TFDS, array_record), or the "
        "folder of train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
    )
    parser.add_argument(
        "--data_dir",
        default=tfds.default_data_dir(),
        help="folder of prepared data sets, where <name>/<version>/ is made (default: %(default)s)",
    )
    parser.add_argument(
        "--side",
        type=int,
        default=DEFAULT_SIDE,
        help="ImageNet: what the shorter side is resized to; 256 is for images of 224 (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, help="ImageNet: number of processes (default: one for each core)")
    parser.add_argument(
        "--official_only", action="store_true", help="refuse a source whose checksum is not that of the official files"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
