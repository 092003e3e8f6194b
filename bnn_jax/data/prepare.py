"""Turns a downloaded data set into the folder that training reads. TensorFlow is not needed.

    python -m bnn_jax.data.prepare cifar10 --source cifar-10-python.tar.gz --data_dir ~/tensorflow_datasets
    python -m bnn_jax.data.prepare imagenet --source FOLDER --data_dir ~/tensorflow_datasets --workers 16

ImageNet is decoded and resized once, see ``resize_imagenet``: about 340 GB, which the data source
'imagenet2012_resized' reads. The others become TFDS folders.

Checksums are compared where they are known. A source that is not the official one is prepared all the same, with a
warning, since archives are also repacked and images kept in folders; ``--official_only`` refuses it. Damaged and
truncated sources are always refused.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from bnn_jax.data import downloads, resize_imagenet, resized, tfds_writer
from bnn_jax.data.streaming import available_cores
from bnn_jax.data.tfds_source import RESIDENT_SETS, default_data_dir, progress_bar
from bnn_jax.errors import DataError, UserError


def prepare(
    name: str, source: pathlib.Path, data_dir: pathlib.Path, *, official_only: bool = False, progress: bool = False
) -> tuple[pathlib.Path, downloads.Download]:
    """Reads a download and writes its TFDS folder.

    Args:
      name: 'cifar10', 'cifar100' or 'mnist'.
      source: see ``downloads.read``.
      data_dir: folder of prepared data sets.
      official_only: whether a source whose checksum is not that of the official files is refused.
      progress: whether progress bars are shown on stderr.

    Returns:
      The new folder and what was read; its ``unofficial`` says why this may not be the official data.

    Raises:
      DataError: the source is not usable, or the folder is there already.
    """
    tfds_writer.target_folder(name, data_dir)  # Before minutes are spent on reading.
    with progress_bar(progress) as bar:
        download = downloads.read(name, source, bar=bar)
        if official_only and download.unofficial:
            raise DataError(f"{download.unofficial[0]} (refused because of --official_only)")
        return tfds_writer.write(name, download, data_dir, bar=bar), download


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for a mistake the user can mend."""
    options = _parser().parse_args(arguments)
    data_dir = pathlib.Path(options.data_dir).expanduser().absolute()
    source = pathlib.Path(options.source).expanduser()
    try:
        return (_prepare_imagenet if options.name == IMAGENET else _prepare_resident)(options, source, data_dir)
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = (
            "the same command goes on with what is finished" if options.name == IMAGENET else "nothing was prepared"
        )
        print(f"interrupted: {goes_on}", file=sys.stderr)
        return 130


def _prepare_imagenet(options: argparse.Namespace, source: pathlib.Path, data_dir: pathlib.Path) -> int:
    if options.official_only:
        raise DataError("--official_only: no checksum of ImageNet is known; leave it out")
    workers = available_cores() if options.workers is None else options.workers
    if workers < 1:
        raise DataError(f"--workers {workers}: accepted is 1 or more")
    with progress_bar(sys.stderr.isatty()) as bar:
        folder, counts = resize_imagenet.prepare(source, data_dir, side=options.side, workers=workers, bar=bar)
    flags = f"--config.data.name={resized.NAME} --config.data.data_dir={data_dir}"
    if options.side != DEFAULT_SIDE:
        flags += f" --config.data.side={options.side}"
    images = f"{counts['train']} training and {counts['validation']} validation images"
    print(f"imagenet: {images} in {folder}; train on them with {flags}")
    return 0


def _prepare_resident(options: argparse.Namespace, source: pathlib.Path, data_dir: pathlib.Path) -> int:
    if (options.workers, options.side) != (None, DEFAULT_SIDE):
        raise DataError(f"--workers and --side: accepted with {IMAGENET} only")
    folder, download = prepare(
        options.name, source, data_dir, official_only=options.official_only, progress=sys.stderr.isatty()
    )
    for line in download.unofficial:
        print(f"warning: {line}", file=sys.stderr)
    counts = f"{len(download.train.images)} training and {len(download.test.images)} test images"
    print(f"{options.name}: {counts} in {folder}; train on them with --config.data.data_dir={data_dir}")
    return 0


IMAGENET = "imagenet"
DEFAULT_SIDE = 256


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bnn_jax.data.prepare",
        description="Turns a downloaded data set into the folder that training reads, without TensorFlow.",
        epilog="The CIFAR archives: https://www.cs.toronto.edu/~kriz/cifar.html. Nothing is downloaded. ImageNet takes "
        "about 340 GB; a command that is interrupted goes on with what is finished when it is given again.",
    )
    parser.add_argument("name", choices=sorted((*RESIDENT_SETS, IMAGENET)), help="the data set")
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
        default=default_data_dir(),
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
