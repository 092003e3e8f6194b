"""Small downloads in the official formats, made by the tests."""

import gzip
import io
import pathlib
import pickle
import tarfile
import types
from typing import ClassVar

import numpy as np
from PIL import Image

from bnn_jax.data.archives import CLASSES, Download, DownloadedSplit
from bnn_jax.data.tfds import TFDS_SETS

TRAIN_PER_BATCH, TEST = 4, 6


def random_split(name: str, count: int, *, seed: int) -> DownloadedSplit:
    """Random images; no two are equal, and labels of different features differ."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *TFDS_SETS[name].image_shape), dtype=np.uint8)
    labels = {feature: generator.integers(0, len(names), count) for feature, names in CLASSES[name].items()}
    return DownloadedSplit(images, labels)


def random_download(name: str) -> Download:
    """A download of 20 training and 6 test images."""
    train, test = random_split(name, 5 * TRAIN_PER_BATCH, seed=0), random_split(name, TEST, seed=1)
    return Download(train, test, "")


def archive_files(name: str, download: Download, *, pickled: bool) -> dict[str, bytes]:
    """The files of an official archive, by path."""
    batches = [(f"data_batch_{i + 1}", part(download.train, i)) for i in range(5)] + [("test_batch", download.test)]
    if name == "cifar100":
        batches = [("train", download.train), ("test", download.test)]
    if pickled:
        folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
        files = {key: pickle_as_python2(_pickled_batch(split)) for key, split in batches}
    else:
        folder = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
        files = {f"{key}.bin": _binary_batch(split) for key, split in batches}
    return {f"{folder}/{key}": content for key, content in files.items()}


ORDER = ("coarse_label", "label")


def _python_name(feature: str) -> str:
    return {"label": "fine_labels", "coarse_label": "coarse_labels"}[feature]


def part(split: DownloadedSplit, number: int) -> DownloadedSplit:
    """One of the five training batches."""
    rows = slice(number * TRAIN_PER_BATCH, (number + 1) * TRAIN_PER_BATCH)
    return DownloadedSplit(split.images[rows], {feature: labels[rows] for feature, labels in split.labels.items()})


def _planes(split: DownloadedSplit) -> np.ndarray:
    return split.images.transpose(0, 3, 1, 2).reshape(len(split.images), -1)


def _pickled_batch(split: DownloadedSplit) -> dict:
    names = {"label": "labels"} if len(split.labels) == 1 else {feature: _python_name(feature) for feature in ORDER}
    labels = {names[feature].encode(): values.tolist() for feature, values in split.labels.items()}
    file_names = [f"image_{i}.png".encode() for i in range(len(split.images))]
    return {b"batch_label": b"made by a test", **labels, b"data": _planes(split), b"filenames": file_names}


def _binary_batch(split: DownloadedSplit) -> bytes:
    columns = [values.astype(np.uint8)[:, None] for values in split.labels.values()]
    return np.concatenate([*columns, _planes(split)], axis=1).tobytes()


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as the 8-bit strings of Python 2, as in the official files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def _save_string(self, value: bytes) -> None:
        if len(value) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
        else:
            self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = _save_string


def pickle_as_python2(value: object) -> bytes:
    """Protocol 2 as Python 2 wrote it."""
    buffer = io.BytesIO()
    _Python2Pickler(buffer, 2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_archive(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """A .tar.gz with the files and a folder entry."""
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo(next(iter(files)).split("/")[0])
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_files(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """The same files unpacked."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def mnist_files(download: Download, *, compressed: bool) -> dict[str, bytes]:
    """The four files of MNIST, by name."""
    files = {}
    for key, split in (("train", download.train), ("t10k", download.test)):
        header = bytes((0, 0, 8, 3)) + np.array(split.images.shape[:3], ">u4").tobytes()
        files[f"{key}-images-idx3-ubyte"] = header + split.images.tobytes()
        header = bytes((0, 0, 8, 1)) + np.array([len(split.images)], ">u4").tobytes()
        files[f"{key}-labels-idx1-ubyte"] = header + split.labels["label"].astype(np.uint8).tobytes()
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()} if compressed else files


def write_image_folder(folder: pathlib.Path, class_folders: tuple[str, ...], *, shape: tuple[int, ...]) -> np.ndarray:
    """One random PNG per class in both splits; returns the pixels (2, classes, *shape)."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, len(class_folders), *shape), dtype=np.uint8)
    for key, images in zip(("train", "test"), pixels):
        for class_folder, image in zip(class_folders, images):
            (folder / key / class_folder).mkdir(parents=True)
            Image.fromarray(image.squeeze()).save(folder / key / class_folder / "0.png")
    return pixels


def smooth_picture(height: int, width: int, *, seed: int) -> Image.Image:
    """A picture of colours that change slowly, so that JPEG and resizing change it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def small_pictures(count: int, *, seed: int) -> list[tuple[bytes, int]]:
    """JPEG files of different sizes and their labels."""
    sizes = np.random.default_rng(seed).integers(30, 60, (count, 2)).tolist()
    return [
        (encoded(smooth_picture(*size, seed=100 * seed + number)), (37 * number + seed) % 1000)
        for number, size in enumerate(sizes)
    ]


def write_imagenet(
    folder: pathlib.Path, train: list[tuple[bytes, int]], validation: list[tuple[bytes, int]]
) -> pathlib.Path:
    """A TFDS folder of ImageNet with these files and labels, in TFDS's own order; made by the stock builder."""
    import tensorflow_datasets as tfds

    stock = tfds.builder_cls("imagenet2012")

    def examples(split, pictures):
        for number, (content, label) in enumerate(pictures):
            yield number, {"image": content, "label": label, "file_name": f"{split}_{number}.JPEG"}

    def split_generators(self, download_manager):
        del self, download_manager
        return {"train": examples("train", train), "validation": examples("validation", validation)}

    namespace = {"name": "imagenet2012", "_split_generators": split_generators, "pkg_dir_path": stock.pkg_dir_path}
    # Without a code path TFDS looks for no table of download checksums, which would need importlib_resources.
    namespace.update(code_path=None, __module__=stock.__module__)
    builder = types.new_class(stock.__name__, (stock,), {"skip_registration": True}, lambda n: n.update(namespace))
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    builder(data_dir=str(folder)).download_and_prepare(file_format="array_record", download_config=config)
    return folder
