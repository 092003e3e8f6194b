import gzip
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from bnn_jax.data import archives
from bnn_jax.errors import DataError
from tests.data import makers

CIFAR10, SHAPE = archives.CIFAR10_CLASSES, (32, 32, 3)
DIGITS = tuple(str(digit) for digit in range(10))
CASES = [("cifar10", True), ("cifar10", False), ("cifar100", True), ("cifar100", False)]


def _files(name="cifar10", pickled=True):
    return makers.archive_files(name, makers.random_download(name), pickled=pickled)


def _assert_equal(found, expected):
    np.testing.assert_array_equal(found.images, expected.images)
    assert found.labels.keys() == expected.labels.keys()
    for feature, labels in expected.labels.items():
        np.testing.assert_array_equal(found.labels[feature], labels)


def _refused(source, message, name="cifar10"):
    with pytest.raises(DataError, match=message) as raised:
        archives.read(name, source)
    assert "\n" not in str(raised.value)
    assert str(source) in str(raised.value)


@pytest.mark.parametrize(("name", "pickled"), CASES)
def test_an_archive_is_read_in_its_order(tmp_path, name, pickled):
    expected = makers.random_download(name)
    found = archives.read(name, makers.write_archive(tmp_path / "a.tar.gz", _files(name, pickled)))
    _assert_equal(found.train, expected.train)
    _assert_equal(found.test, expected.test)
    assert "not the official files, their MD5 is another" in found.unofficial


@pytest.mark.parametrize(("name", "pickled"), CASES)
def test_unpacked_files_are_found_in_the_folder_and_one_below(tmp_path, name, pickled):
    expected = makers.random_download(name)
    outer = makers.write_files(tmp_path / "d", _files(name, pickled))
    (outer / "another").mkdir()
    inner = next(path for path in outer.iterdir() if path.name.startswith("cifar"))
    for folder in (outer, inner):
        found = archives.read(name, folder)
        _assert_equal(found.train, expected.train)
        _assert_equal(found.test, expected.test)
        assert "their MD5 is another" in found.unofficial


def test_matching_checksums_leave_no_doubt(tmp_path, monkeypatch):
    source = makers.write_archive(tmp_path / "a.tar.gz", _files())
    digest = hashlib.md5(source.read_bytes()).hexdigest()
    monkeypatch.setitem(archives.MD5, "cifar10", digest)
    assert archives.read("cifar10", source).unofficial == ""


@pytest.mark.parametrize("lost", [1, 6, 100, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("pickled", [True, False])
def test_a_truncated_archive_is_refused(tmp_path, pickled, lost):
    source = makers.write_archive(tmp_path / "a.tar.gz", _files(pickled=pickled))
    content = source.read_bytes()
    lost = int(lost * len(content)) if lost < 1 else lost
    source.write_bytes(content[: len(content) - lost])
    _refused(source, "is truncated or damaged, download it again")


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    source = makers.write_archive(tmp_path / "a.tar.gz", _files(pickled=False))
    content = source.read_bytes()
    for position in range(20, len(content), len(content) // 20):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        source.write_bytes(damaged)
        _refused(source, "is truncated or damaged, download it again")


def test_a_web_page_saved_as_an_archive_is_refused(tmp_path):
    source = tmp_path / "cifar-10-python.tar.gz"
    source.write_text("<html>404 not found</html>" * 50)
    _refused(source, "is truncated or damaged, download it again")


def test_an_uncompressed_archive_is_read(tmp_path):
    source = makers.write_archive(tmp_path / "a.tar.gz", _files())
    plain = tmp_path / "a.tar"
    plain.write_bytes(gzip.decompress(source.read_bytes()))
    _assert_equal(archives.read("cifar10", plain).train, makers.random_download("cifar10").train)


def test_a_missing_batch_is_named(tmp_path):
    files = _files()
    del files["cifar-10-batches-py/data_batch_4"]
    _refused(makers.write_archive(tmp_path / "a.tar.gz", files), r"\(data_batch_4 missing\)")
    _refused(makers.write_files(tmp_path / "d", files), r"\(data_batch_4 missing\)")


def test_a_folder_of_something_else_says_what_is_accepted(tmp_path):
    _refused(tmp_path, r"none of its files found\): accepted is cifar-10-python.tar.gz or cifar-10-binary.tar.gz")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_written_by_python_3_are_read(tmp_path, protocol):
    files = _files()
    expected = makers.random_download("cifar10")
    batch = makers.part(expected.train, 0)
    content = {
        "data": batch.images.transpose(0, 3, 1, 2).reshape(len(batch.images), -1),
        "labels": list(batch.labels["label"].astype(np.uint8)),
    }
    files["cifar-10-batches-py/data_batch_1"] = pickle.dumps(content, protocol=protocol)
    _assert_equal(archives.read("cifar10", makers.write_archive(tmp_path / "a.tar.gz", files)).train, expected.train)


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_hostile_pickle_runs_nothing(tmp_path):
    files = _files()
    trace = tmp_path / "trace"
    files["cifar-10-batches-py/data_batch_2"] = pickle.dumps({b"data": _Hostile(str(trace))}, protocol=2)
    _refused(makers.write_archive(tmp_path / "a.tar.gz", files), r"data_batch_2: .*refused")
    assert not trace.exists()


def _batch(**changes):
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 9], **{k.encode(): v for k, v in changes.items()}}
    return makers.pickle_as_python2(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_batch(labels=[0, 10]), "test_batch: label 10 is not in 0 to 9"),
        (_batch(labels=[-1, 0]), "test_batch: label -1 is not in 0 to 9"),
        (_batch(labels=[1]), "test_batch: 2 images, but 1 of 'label'"),
        (_batch(labels=[1.5, 2]), "test_batch: 'labels' is no list of integers"),
        (_batch(labels=None), "test_batch: 'labels' is no list of integers"),
        (_batch(data=np.zeros((2, 3071), np.uint8)), "test_batch: 'data' is no uint8 array"),
        (_batch(data=np.zeros((2, 3072), np.int16)), "test_batch: 'data' is no uint8 array"),
        (_batch(data=np.zeros((0, 3072), np.uint8), labels=[]), "test_batch: holds no image"),
        (makers.pickle_as_python2([1]), "test_batch: holds no dictionary"),
        (_batch()[:-100], "test_batch: .*refused"),
        (b"", "test_batch: .*refused"),
    ],
)
def test_a_batch_with_wrong_content_is_named(tmp_path, content, message):
    files = _files() | {"cifar-10-batches-py/test_batch": content}
    _refused(makers.write_archive(tmp_path / "a.tar.gz", files), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(3072), "test_batch.bin: 3072 bytes are no whole number of 3073-byte images"),
        (b"", "test_batch.bin: 0 bytes are no whole number"),
        (b"\x0a" + bytes(3072), "test_batch.bin: label 10 is not in 0 to 9"),
    ],
)
def test_binary_records_are_checked(tmp_path, content, message):
    files = _files(pickled=False) | {"cifar-10-batches-bin/test_batch.bin": content}
    _refused(makers.write_archive(tmp_path / "a.tar.gz", files), message)


def test_links_in_an_archive_are_not_followed(tmp_path):
    files = _files(pickled=False)
    secret = files.pop("cifar-10-batches-bin/test_batch.bin")
    (tmp_path / "secret").write_bytes(secret)
    source = makers.write_archive(tmp_path / "a.tar", files)
    with tarfile.open(source, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    _refused(source, r"test_batch.bin missing")


# ---- MNIST


def _mnist_folder(tmp_path, *, compressed=False, **changes):
    files = makers.mnist_files(makers.random_download("mnist"), compressed=compressed)
    return makers.write_files(tmp_path, files | changes)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw"])
def test_the_four_files_are_read(tmp_path, compressed, folder):
    expected = makers.random_download("mnist")
    _mnist_folder(tmp_path / folder, compressed=compressed)
    found = archives.read("mnist", tmp_path)
    for split, wanted in ((found.train, expected.train), (found.test, expected.test)):
        np.testing.assert_array_equal(split.images, wanted.images)
        np.testing.assert_array_equal(split.labels["label"], wanted.labels["label"])
    assert found.train.images.shape == (20, 28, 28, 1)
    assert "their MD5 is another" in found.unofficial


def test_the_other_spelling_of_the_names_is_read(tmp_path):
    for path in list(_mnist_folder(tmp_path).iterdir()):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert len(archives.read("mnist", tmp_path).test.images) == makers.TEST


def test_a_missing_file_of_mnist_is_named(tmp_path):
    (_mnist_folder(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    _refused(tmp_path, r"no source of mnist \(t10k-labels-idx1-ubyte.gz missing\)", name="mnist")


def test_a_file_as_source_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    _refused(tmp_path / "x", "is a file: accepted is a folder with train-images", name="mnist")


def test_a_truncated_file_of_mnist_is_refused(tmp_path):
    path = _mnist_folder(tmp_path, compressed=True) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    _refused(tmp_path, "train-images-idx3-ubyte.gz is truncated or damaged, download it again", name="mnist")


def test_a_truncated_unpacked_file_of_mnist_is_refused(tmp_path):
    path = _mnist_folder(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-20])
    _refused(tmp_path, r"train-images-idx3-ubyte is truncated: 15660 bytes for shape \(20, 28, 28\)", name="mnist")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"\0\0\x08\x01", "is no idx file of 3-dimensional bytes"),
        ("train-labels-idx1-ubyte", b"", "is no idx file of 1-dimensional bytes"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x01\x05", "20 images, but 1 of 'label'"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x06" + bytes([1, 2, 3, 4, 5, 10]), "label 10 is not in 0 to 9"),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\x03" + bytes([0, 0, 0, 1] * 3) + b"\0", "expected .28, 28."),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12, "is truncated: 0 bytes for shape"),
    ],
)
def test_wrong_content_of_mnist_is_named(tmp_path, file, content, message):
    _refused(_mnist_folder(tmp_path, **{file: content}), message, name="mnist")


def test_checksums_of_mnist_that_agree_leave_no_doubt(tmp_path, monkeypatch):
    files = _mnist_folder(tmp_path, compressed=True).iterdir()
    monkeypatch.setitem(archives.MD5, "mnist", " ".join(hashlib.md5(path.read_bytes()).hexdigest() for path in files))
    assert archives.read("mnist", tmp_path).unofficial == ""


# ---- a folder of images for each class


def test_images_get_the_official_label_of_their_folder(tmp_path):
    train, test = makers.write_image_folder(tmp_path, CIFAR10[::-1], shape=SHAPE)
    found = archives.read("cifar10", tmp_path)
    np.testing.assert_array_equal(found.train.images, train[::-1])
    np.testing.assert_array_equal(found.test.images, test[::-1])
    np.testing.assert_array_equal(found.train.labels["label"], range(10))
    assert "no checksum exists for images in a folder" in found.unofficial


def test_folders_named_by_numbers_are_ordered_as_numbers(tmp_path):
    train, _ = makers.write_image_folder(tmp_path, tuple(str(i) for i in range(100)), shape=SHAPE)
    np.testing.assert_array_equal(archives.read("cifar100", tmp_path).train.images, train)


def test_cifar100_superclasses_follow_from_the_classes(tmp_path):
    makers.write_image_folder(tmp_path, archives.CIFAR100_CLASSES, shape=SHAPE)
    found = archives.read("cifar100", tmp_path)
    for fine, coarse in zip(found.train.labels["label"], found.train.labels["coarse_label"]):
        group = archives.CIFAR100_SUPERCLASSES[archives.CLASSES["cifar100"]["coarse_label"][coarse]]
        assert archives.CIFAR100_CLASSES[fine] in group


def test_the_table_of_cifar100_has_twenty_groups_of_five():
    assert len(archives.CIFAR100_SUPERCLASSES) == 20
    assert len(set(archives.CIFAR100_CLASSES)) == len(archives.CIFAR100_CLASSES) == 100
    assert all(len(group) == 5 for group in archives.CIFAR100_SUPERCLASSES.values())
    assert list(archives.CIFAR100_SUPERCLASSES) == sorted(archives.CIFAR100_SUPERCLASSES)


def test_gray_images_make_an_mnist(tmp_path):
    train, _ = makers.write_image_folder(tmp_path, DIGITS, shape=(28, 28, 1))
    np.testing.assert_array_equal(archives.read("mnist", tmp_path).train.images, train)


def test_files_of_a_class_are_taken_in_the_order_of_their_names(tmp_path):
    makers.write_image_folder(tmp_path, CIFAR10, shape=SHAPE)
    for value in (3, 1, 2):
        Image.fromarray(np.full(SHAPE, value, np.uint8)).save(tmp_path / "train" / "bird" / f"{value}.png")
    found = archives.read("cifar10", tmp_path).train
    birds = found.images[found.labels["label"] == 2]
    np.testing.assert_array_equal(birds[1:, 0, 0, 0], [1, 2, 3])


def test_other_class_names_are_refused(tmp_path):
    makers.write_image_folder(tmp_path, ("plane", *CIFAR10[1:]), shape=SHAPE)
    _refused(tmp_path, "not those of cifar10 .see 'plane'.: accepted are the official names, 'airplane' to 'truck', or")


def test_a_missing_class_is_named(tmp_path):
    makers.write_image_folder(tmp_path, CIFAR10[:-1], shape=SHAPE)
    _refused(tmp_path, "9 class folders, not those of cifar10 .see 'truck'.")


def test_a_corrupt_image_of_a_folder_is_named(tmp_path):
    makers.write_image_folder(tmp_path, CIFAR10, shape=SHAPE)
    path = tmp_path / "train" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    _refused(tmp_path, "train/dog/0.png: the image is corrupt")


@pytest.mark.parametrize(("size", "mode"), [((31, 32), "RGB"), ((32, 32), "L"), ((32, 32), "P"), ((32, 32), "RGBA")])
def test_images_of_another_shape_are_named(tmp_path, size, mode):
    makers.write_image_folder(tmp_path, CIFAR10, shape=SHAPE)
    Image.new(mode, size).save(tmp_path / "train" / "dog" / "0.png")
    _refused(tmp_path, r"train/dog/0.png: shape .*; expected \(32, 32, 3\), RGB")


def test_a_palette_image_is_not_taken_for_a_gray_one(tmp_path):
    makers.write_image_folder(tmp_path, DIGITS, shape=(28, 28, 1))
    Image.new("P", (28, 28)).save(tmp_path / "train" / "3" / "0.png")
    _refused(tmp_path, r"train/3/0.png: shape \(28, 28, 1\), mode P; expected \(28, 28, 1\), L", name="mnist")


def test_other_files_and_empty_folders_are_named(tmp_path):
    makers.write_image_folder(tmp_path, CIFAR10, shape=SHAPE)
    (tmp_path / "train" / "dog" / ".DS_Store").write_text("hidden files are ignored")
    archives.read("cifar10", tmp_path)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("x")
    _refused(tmp_path, "notes.txt is no image: accepted are the formats of Pillow")
    (tmp_path / "train" / "dog" / "notes.txt").unlink()
    (tmp_path / "train" / "dog" / "0.png").unlink()
    _refused(tmp_path, "train/dog holds no image")
