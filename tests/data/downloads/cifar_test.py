import gzip
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest

from bnn_jax.data.downloads import base, cifar
from bnn_jax.errors import DataError
from tests.data import makers

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
        cifar.read(name, source)
    assert "\n" not in str(raised.value)
    assert str(source) in str(raised.value)


@pytest.mark.parametrize(("name", "pickled"), CASES)
def test_an_archive_is_read_in_its_order(tmp_path, name, pickled):
    expected = makers.random_download(name)
    found = cifar.read(name, makers.write_archive(tmp_path / "a.tar.gz", _files(name, pickled)))
    _assert_equal(found.train, expected.train)
    _assert_equal(found.test, expected.test)
    assert found.class_names == base.OFFICIAL_CLASSES[name]
    assert len(found.unofficial) == 1
    assert "not the official archive: the MD5 of" in found.unofficial[0]


@pytest.mark.parametrize(("name", "pickled"), CASES)
def test_unpacked_files_are_found_in_the_folder_and_one_below(tmp_path, name, pickled):
    expected = makers.random_download(name)
    outer = makers.write_files(tmp_path / "d", _files(name, pickled))
    (outer / "another").mkdir()
    inner = next(path for path in outer.iterdir() if path.name.startswith("cifar"))
    for folder in (outer, inner):
        found = cifar.read(name, folder)
        _assert_equal(found.train, expected.train)
        _assert_equal(found.test, expected.test)
        assert ("their MD5 is another" if pickled else "no checksum is known") in found.unofficial[0]


def test_matching_checksums_leave_no_doubt(tmp_path, monkeypatch):
    source = makers.write_archive(tmp_path / "a.tar.gz", _files())
    digest = hashlib.md5(source.read_bytes()).hexdigest()
    monkeypatch.setitem(base.MD5, "cifar-10-python.tar.gz", digest)
    assert cifar.read("cifar10", source).unofficial == ()


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
    _assert_equal(cifar.read("cifar10", plain).train, makers.random_download("cifar10").train)


def test_the_archive_of_the_other_data_set_is_named(tmp_path):
    source = makers.write_archive(tmp_path / "a.tar.gz", _files("cifar100"))
    _refused(source, "is the archive of cifar100, not of cifar10")


def test_a_missing_batch_is_named(tmp_path):
    files = _files()
    del files["cifar-10-batches-py/data_batch_4"]
    _refused(makers.write_archive(tmp_path / "a.tar.gz", files), r"\(data_batch_4 of cifar-10-python.tar.gz missing\)")
    _refused(makers.write_files(tmp_path / "d", files), r"\(data_batch_4 of cifar-10-python.tar.gz missing\)")


def test_a_folder_of_something_else_says_what_is_accepted(tmp_path):
    _refused(tmp_path, r"none of its files found\): accepted is cifar-10-python.tar.gz or cifar-10-binary.tar.gz")


@pytest.mark.parametrize(("name", "pickled"), CASES)
def test_missing_class_names_are_the_official_ones(tmp_path, name, pickled):
    files = {key: value for key, value in _files(name, pickled).items() if "meta" not in key and "names" not in key}
    found = cifar.read(name, makers.write_archive(tmp_path / "a.tar.gz", files))
    assert found.class_names == base.OFFICIAL_CLASSES[name]
    assert any("the official names of the classes are used" in line for line in found.unofficial)


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
    _assert_equal(cifar.read("cifar10", makers.write_archive(tmp_path / "a.tar.gz", files)).train, expected.train)


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("member", ["data_batch_2", "batches.meta"])
def test_a_hostile_pickle_runs_nothing(tmp_path, member):
    files = _files()
    trace = tmp_path / "trace"
    files[f"cifar-10-batches-py/{member}"] = pickle.dumps({b"data": _Hostile(str(trace))}, protocol=2)
    _refused(makers.write_archive(tmp_path / "a.tar.gz", files), rf"{member}: .*refused")
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


def test_the_official_file_of_class_names_is_read_and_known(tmp_path):
    # Rebuilt from its description; the checksum shows that these are the very bytes of the official archive.
    strings = [bytes((len(name),)) + name.encode() + b"q" for name in base.OFFICIAL_CLASSES["cifar10"]["label"]]
    names = b"".join(b"U" + string + bytes((number,)) for number, string in enumerate(strings, 5))
    content = b"\x80\x02}q\x01(U\x13num_cases_per_batchq\x02M\x10'U\x0blabel_namesq\x03]q\x04(" + names
    content += b"eU\x07num_visq\x0fM\x00\x0cu."
    assert hashlib.md5(content).hexdigest() == base.MD5["batches.meta"]
    folder = makers.write_files(tmp_path, _files() | {"cifar-10-batches-py/batches.meta": content})
    found = cifar.read("cifar10", folder)
    assert found.class_names == base.OFFICIAL_CLASSES["cifar10"]
    assert "data_batch_1" in found.unofficial[0]
    assert "batches.meta" not in found.unofficial[0]


@pytest.mark.parametrize("names", [["a"] * 10, [chr(97 + i) for i in range(9)], ["", *"bcdefghij"]])
def test_class_names_are_checked(tmp_path, names):
    files = _files() | {"cifar-10-batches-py/batches.meta": makers.pickle_as_python2({b"label_names": names})}
    _refused(makers.write_archive(tmp_path / "a.tar.gz", files), "batches.meta: expected 10 different class names")


def test_a_member_that_comes_twice_is_refused(tmp_path):
    files = _files(pickled=False)
    files["elsewhere/test_batch.bin"] = files["cifar-10-batches-bin/test_batch.bin"]
    _refused(makers.write_archive(tmp_path / "a.tar.gz", files), "test_batch.bin is there twice")


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
    _refused(source, r"test_batch.bin of cifar-10-binary.tar.gz missing")
