"""Reads what people download: official CIFAR archives, packed or unpacked, the MNIST files, or a folder per class.

Nothing is unpacked to disk. The Python archives are pickles and are read through ``restricted_pickle``, which runs
nothing that a file asks for.
"""

import gzip
import hashlib
import io
import pathlib
import tarfile
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bnn_jax import restricted_pickle
from bnn_jax.data.folder import picture_files
from bnn_jax.data.tfds import TFDS_SETS, decode_image, track
from bnn_jax.errors import DataError, UserError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100_SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}

CIFAR100_CLASSES = tuple(sorted(fine for group in CIFAR100_SUPERCLASSES.values() for fine in group))

# The superclass number of each class, in the order of CIFAR100_CLASSES.
CIFAR100_COARSE_LABELS = tuple(
    next(number for number, group in enumerate(CIFAR100_SUPERCLASSES.values()) if fine in group)
    for fine in CIFAR100_CLASSES
)

CIFAR100_CLASSES = tuple(sorted(fine for group in CIFAR100_SUPERCLASSES.values() for fine in group))

# Names in the order of the labels, which is the alphabetical one; the features of CIFAR-100 are in the order of the
# bytes of a binary record.
CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "cifar10": {"label": CIFAR10_CLASSES},
    "cifar100": {"coarse_label": tuple(CIFAR100_SUPERCLASSES), "label": CIFAR100_CLASSES},
    "mnist": {"label": tuple(str(digit) for digit in range(10))},
}

# Files of the training images, and of the test images; in the binary archives they end in '.bin'.
CIFAR_FILES = {
    "cifar10": (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    "cifar100": ("train", "test"),
}
PIXELS = 3 * 32 * 32  # three planes of 32 rows

# Of the archives, Python and binary, and of the unpacked files of the former; of MNIST's four files.
MD5 = {
    "cifar10": "c58f30108f718f92721af3b95e74349a c32a1d4ab5d03f1284b67883e8d87530 c99cafc152244af753f735de768cd75f "
    "d4bba439e000b95fd0a9bffe97cbabec 54ebc095f3ab1f0389bbae665268c751 634d18415352ddfa80567beed471001a "
    "482c414d41f54cd18b22e5b47cb7c3cb 40351d587109b95175f43aff81a1287e",
    "cifar100": "eb9058c3a382ffc7106e4002c42a8d85 03b5dce01913d631647c71ecec9e9cb8 16019d7e3df5f24257cddd939b257f8d "
    "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "mnist": "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 9fb629c4189551a2d022fa330f9573f3 "
    "ec29112dd5afa0611ce80d1b7f02629c",
}

_FOLDER = "a folder with images in train/<class>/ and test/<class>/"
ACCEPTED = {
    "cifar10": f"cifar-10-python.tar.gz or cifar-10-binary.tar.gz, a folder with its files, or {_FOLDER}",
    "cifar100": f"cifar-100-python.tar.gz or cifar-100-binary.tar.gz, a folder with its files, or {_FOLDER}",
    "mnist": f"a folder with train-images-idx3-ubyte.gz and its three companions, or {_FOLDER}",
}


class DownloadedSplit(NamedTuple):
    """Images uint8 (N, H, W, C) in the order of the files; labels int64 (N,) by feature, 'label' or 'coarse_label'."""

    images: np.ndarray
    labels: dict[str, np.ndarray]


class Download(NamedTuple):
    """A data set as it was downloaded; ``unofficial`` says why it may not be the official one, or is empty."""

    train: DownloadedSplit
    test: DownloadedSplit
    unofficial: str


def read(name: str, source: pathlib.Path, *, progress: bool = False) -> Download:
    """Reads a downloaded data set into memory.

    Args:
      name: 'cifar10', 'cifar100' or 'mnist'.
      source: an official archive (CIFAR); a folder of its unpacked files, or of the four files of MNIST; or a folder
        with the images in ``train/<class>/`` and ``test/<class>/``.
      progress: whether a progress bar is shown on stderr.

    Raises:
      DataError: the source is missing, truncated, damaged, hostile or something else.
    """
    if not source.exists():
        raise DataError(f"--source {source} does not exist: accepted is {ACCEPTED[name]}")
    if all((source / split).is_dir() for split in ("train", "test")):
        train, test = (_read_images(name, source / split, progress) for split in ("train", "test"))
        return Download(train, test, f"not verified, no checksum exists for images in a folder: {source}")
    return _read_mnist(source) if name == "mnist" else _read_cifar(name, source)


def _read_images(name: str, folder: pathlib.Path, progress: bool) -> DownloadedSplit:
    """The images of ``folder/<class>/``, class after class in order of their file names.

    The classes have their official names, or the numbers 0, 1, ...
    """
    classes = CLASSES[name]["label"]
    found = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    numbers = tuple(str(number) for number in range(len(classes)))
    if found not in (set(classes), set(numbers)):
        wrong = sorted(found - set(classes)) or sorted(set(classes) - found)
        raise DataError(
            f"{folder} has {len(found)} class folders, not those of {name} (see {wrong[0]!r}): accepted are the "
            f"official names, {classes[0]!r} to {classes[-1]!r}, or the numbers 0 to {len(classes) - 1}"
        )
    files = picture_files(folder, numbers if found == set(numbers) else classes)
    shape = TFDS_SETS[name].image_shape
    images = np.empty((len(files), *shape), np.uint8)
    for index, (file, _) in enumerate(track(files, f"Reading {folder.name}", show=progress)):
        images[index] = decode_image((folder / file).read_bytes(), shape, str(folder / file))
    labels = {"label": np.array([label for _, label in files], np.int64)}
    if name == "cifar100":
        groups = list(CIFAR100_SUPERCLASSES.values())
        coarse = [next(number for number, group in enumerate(groups) if fine in group) for fine in classes]
        labels["coarse_label"] = np.array(coarse, np.int64)[labels["label"]]
    return DownloadedSplit(images, labels)


def _read_cifar(name: str, source: pathlib.Path) -> Download:
    """An archive, or the folder of its unpacked files, or the one above it."""
    parts = CIFAR_FILES[name]
    wanted = {part + suffix for part in parts for suffix in ("", ".bin")}
    files, paths = (_archive_members if source.is_file() else _folder_members)(source, wanted)
    suffix = max(("", ".bin"), key=lambda ending: sum(part + ending in files for part in parts))
    missing = [part + suffix for part in parts if part + suffix not in files]
    if missing:
        found = f"{', '.join(missing)} missing" if files else "none of its files found"
        raise DataError(f"{source} is no source of {name} ({found}): accepted is {ACCEPTED[name]}")
    parse = _parse_binary_batch if suffix else _parse_pickled_batch
    batches = {part: parse(files[part + suffix], tuple(CLASSES[name]), f"{source}, {part}{suffix}") for part in parts}
    for part, batch in batches.items():
        _check(name, batch, f"{source}, {part}{suffix}")
    *train, test = batches.values()
    labels = {feature: np.concatenate([batch.labels[feature] for batch in train]) for feature in test.labels}
    images = np.concatenate([batch.images for batch in train])
    return Download(DownloadedSplit(images, labels), test, _doubt(name, paths))


def _archive_members(source: pathlib.Path, wanted: set[str]) -> tuple[dict[str, bytes], list[pathlib.Path]]:
    """The wanted files of a tar archive by base name, and the archive."""
    content = source.read_bytes()
    try:
        # All at once, so that gzip compares the checksum at its end.
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = {pathlib.PurePosixPath(member.name).name: member for member in archive if member.isreg()}
            readers = {name: archive.extractfile(member) for name, member in members.items() if name in wanted}
            return {name: reader.read() for name, reader in readers.items() if reader is not None}, [source]
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source} is truncated or damaged, download it again: {reason}") from error


def _folder_members(source: pathlib.Path, wanted: set[str]) -> tuple[dict[str, bytes], list[pathlib.Path]]:
    """The wanted files of a folder, or of one folder below it, and their paths."""
    folders = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    best = max(folders, key=lambda folder: sum((folder / file).is_file() for file in wanted))
    paths = [best / file for file in sorted(wanted) if (best / file).is_file()]
    return {path.name: path.read_bytes() for path in paths}, paths


def _doubt(name: str, paths: Iterable[pathlib.Path]) -> str:
    """One line that names the files whose checksum is not that of an official one; empty if there are none."""
    different = [str(path) for path in paths if hashlib.md5(path.read_bytes()).hexdigest() not in MD5[name]]
    return f"not the official files, their MD5 is another: {', '.join(different)}" if different else ""


def _check(name: str, split: DownloadedSplit, where: str) -> None:
    """Raises a DataError if there is no image, a label out of range, or not one label for each image."""
    if len(split.images) == 0:
        raise DataError(f"{where}: holds no image")
    for feature, values in split.labels.items():
        if len(values) != len(split.images):
            raise DataError(f"{where}: {len(split.images)} images, but {len(values)} of '{feature}'")
        count = len(CLASSES[name][feature])
        outside = values[(values < 0) | (values >= count)]
        if len(outside):
            raise DataError(f"{where}: {feature} {outside[0]} is not in 0 to {count - 1}")


def _parse_binary_batch(content: bytes, features: tuple[str, ...], where: str) -> DownloadedSplit:
    """Records of one byte per label and 3072 bytes of pixels."""
    record = len(features) + PIXELS
    if not content or len(content) % record:
        raise DataError(f"{where}: {len(content)} bytes are no whole number of {record}-byte images; it is truncated")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = {feature: records[:, column].astype(np.int64) for column, feature in enumerate(features)}
    return DownloadedSplit(_planes_to_images(records[:, len(features) :]), labels)


def _parse_pickled_batch(content: bytes, features: tuple[str, ...], where: str) -> DownloadedSplit:
    """A dictionary with 'data' uint8 (N, 3072) and lists of labels."""
    try:
        # The official files were written by Python 2, whose strings are bytes.
        batch = restricted_pickle.load_arrays(io.BytesIO(content))
    except UserError as error:
        raise DataError(f"{where}: {error}") from error
    if not isinstance(batch, dict):
        raise DataError(f"{where}: holds no dictionary")
    batch = {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in batch.items()}
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise DataError(f"{where}: 'data' is no uint8 array (N, {PIXELS})")
    labels = {}
    for feature in features:
        key = {"coarse_label": "coarse_labels", "label": "labels" if len(features) == 1 else "fine_labels"}[feature]
        values = batch.get(key)
        if not isinstance(values, list) or not all(type(value) is int and abs(value) < 2**31 for value in values):
            raise DataError(f"{where}: '{key}' is no list of integers")
        labels[feature] = np.array(values, np.int64)
    return DownloadedSplit(_planes_to_images(data), labels)


def _planes_to_images(planes: np.ndarray) -> np.ndarray:
    """(N, 3072) -> (N, 32, 32, 3)."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_mnist(source: pathlib.Path) -> Download:
    """A folder of the four files, compressed or not."""
    if not source.is_dir():
        raise DataError(f"--source {source} is a file: accepted is {ACCEPTED['mnist']}")
    paths, splits = [], []
    for split in ("train", "t10k"):
        paths += [_find_idx(source, f"{split}-images", "idx3"), _find_idx(source, f"{split}-labels", "idx1")]
        images, labels = _parse_idx(paths[-2], dimensions=3), _parse_idx(paths[-1], dimensions=1)
        if images.shape[1:] != (28, 28):
            raise DataError(f"{paths[-2]}: images of {images.shape[1:]} pixels, expected (28, 28)")
        splits.append(DownloadedSplit(images[..., None], {"label": labels.astype(np.int64)}))
        _check("mnist", splits[-1], str(paths[-2]))
    return Download(splits[0], splits[1], _doubt("mnist", paths))


def _find_idx(source: pathlib.Path, name: str, kind: str) -> pathlib.Path:
    """Path of an idx file: in the folder or the ones torchvision makes, compressed or not, '-idx' or '.idx'."""
    for folder in (source, source / "raw", source / "MNIST" / "raw"):
        for path in (folder / f"{name}{dot}{kind}-ubyte{end}" for dot in "-." for end in (".gz", "")):
            if path.is_file():
                return path
    raise DataError(f"{source} is no source of mnist ({name}-{kind}-ubyte.gz missing): accepted is {ACCEPTED['mnist']}")


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
