import hashlib

import numpy as np
import pytest

from bnn_jax.data.downloads import base, mnist
from bnn_jax.errors import DataError
from tests.data import makers


def _folder(tmp_path, *, compressed=False, **changes):
    files = makers.mnist_files(makers.random_download("mnist"), compressed=compressed)
    return makers.write_files(tmp_path, files | changes)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw"])
def test_the_four_files_are_read(tmp_path, compressed, folder):
    expected = makers.random_download("mnist")
    _folder(tmp_path / folder, compressed=compressed)
    found = mnist.read(tmp_path)
    for split, wanted in ((found.train, expected.train), (found.test, expected.test)):
        np.testing.assert_array_equal(split.images, wanted.images)
        np.testing.assert_array_equal(split.labels["label"], wanted.labels["label"])
    assert found.train.images.shape == (20, 28, 28, 1)
    assert ("their MD5 is another" if compressed else "no checksum is known") in found.unofficial[0]


def test_the_other_spelling_of_the_names_is_read(tmp_path):
    for path in list(_folder(tmp_path).iterdir()):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert len(mnist.read(tmp_path).test.images) == makers.TEST


def _refused(folder, message):
    with pytest.raises(DataError, match=message) as raised:
        mnist.read(folder)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    (_folder(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    _refused(tmp_path, r"no source of mnist \(t10k-labels-idx1-ubyte.gz missing\)")


def test_a_file_as_source_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    _refused(tmp_path / "x", "is a file: accepted is a folder with train-images")


def test_a_truncated_file_is_refused(tmp_path):
    path = _folder(tmp_path, compressed=True) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    _refused(tmp_path, "train-images-idx3-ubyte.gz is truncated or damaged, download it again")


def test_a_truncated_unpacked_file_is_refused(tmp_path):
    path = _folder(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-20])
    _refused(tmp_path, r"train-images-idx3-ubyte is truncated: 15660 bytes for shape \(20, 28, 28\)")


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
def test_wrong_content_is_named(tmp_path, file, content, message):
    _refused(_folder(tmp_path, **{file: content}), message)


def test_checksums_that_agree_leave_no_doubt(tmp_path, monkeypatch):
    for path in _folder(tmp_path, compressed=True).iterdir():
        monkeypatch.setitem(base.MD5, path.name, hashlib.md5(path.read_bytes()).hexdigest())
    assert mnist.read(tmp_path).unofficial == ()
