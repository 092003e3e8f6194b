"""Hostile and damaged files of arrays; what they may cost is tested in storage/torch_files_test.py."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from bnn_jax.array_files import BoundedFile, is_safetensors, read_npz, read_safetensors
from bnn_jax.errors import UserError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b/c": np.arange(4, dtype=np.int64),
    "d": np.array(True),
    "e": np.arange(3, dtype=np.float16),
}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def read(path, content: bytes, reader):
    path.write_bytes(content)
    with BoundedFile(io.FileIO(path)) as file:
        return reader(file)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


# ---- .safetensors


def with_header(header, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_what_the_library_wrote_is_read(tmp_path):
    content = safetensors.numpy.save(ARRAYS, metadata={"format": "np"})
    assert is_safetensors(content[:9])
    metadata, arrays = read(tmp_path / "x", content, read_safetensors)
    assert metadata == {"format": "np"}
    same(arrays, ARRAYS)


def test_bfloat16_becomes_float32(tmp_path):
    raw = (np.array([1.0, -2.5], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    header = {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    _, arrays = read(tmp_path / "x", with_header(header, raw), read_safetensors)
    same(arrays, {"x": np.array([1.0, -2.5], np.float32)})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cut off"),
        (with_header({"x": ENTRY})[:20], "cut off"),
        (with_header({"x": ENTRY}, bytes(7)), "lies outside of the file"),
        (with_header({"x": ENTRY}, bytes(9)), "do not lie one behind another"),
        (with_header({"x": ENTRY, "y": ENTRY}, bytes(16)), "do not lie one behind another"),
        (with_header(b"{" * 1000 + b"}" * 1000), "accepted is JSON"),
        (with_header(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "accepted is JSON"),
        (with_header(b"[1]"), "no table"),
        (with_header(b" " * (3 << 20)), "a header of 3145728 bytes"),
        (with_header({"__metadata__": {"a": 1}}, b""), "its metadata are no texts"),
        (with_header({"a" * 501: ENTRY}), "a name of 501 characters"),
        (with_header({f"n{number}": ENTRY for number in range(5001)}), "5001 arrays; accepted are at most 5000"),
        (with_header({"x": {**ENTRY, "dtype": "F8"}}), "x has elements of type F8; accepted: BOOL, U8"),
        (with_header({"x": {**ENTRY, "dtype": ["F32"]}}), "elements of type"),
        (with_header({"x": {**ENTRY, "shape": [3]}}), r"x has 8 bytes for shape \[3\]"),
        (with_header({"x": {**ENTRY, "shape": [-2]}}), r"x: shape=\[-2\]"),
        (with_header({"x": {**ENTRY, "shape": [True, 2]}}), "x: shape="),
        (with_header({"x": {**ENTRY, "shape": [2**40] * 40}}), "lies outside of the file"),
        (with_header({"x": {**ENTRY, "data_offsets": [8, 0]}}), "lies outside of the file"),
        (with_header({"x": {**ENTRY, "data_offsets": [0]}}), "lies outside of the file"),
        (with_header({"x": 3}), "x: shape=None"),
    ],
)
def test_a_damaged_or_hostile_header_is_refused(tmp_path, content, reason):
    with pytest.raises(UserError, match=reason):
        read(tmp_path / "x", content, read_safetensors)


# ---- .npz


def archive(records: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, content in records.items():
            target.writestr(name, content)
    return file.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_wrote_is_read(tmp_path, save):
    file = io.BytesIO()
    save(file, **ARRAYS, fortran=np.asfortranarray(ARRAYS["a"]))
    same(read(tmp_path / "x", file.getvalue(), read_npz), {**ARRAYS, "fortran": ARRAYS["a"]})


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_an_array_of_objects_is_refused_and_not_unpickled(tmp_path):
    content = npy(np.array([Hostile(tmp_path / "made")], object), allow_pickle=True)
    pickle.loads(content[content.index(b"\x80") :])[0].close()  # It would work.
    (tmp_path / "made").unlink()
    with pytest.raises(UserError, match="x has elements of type object; accepted are integers, floats and booleans"):
        read(tmp_path / "x", archive({"x.npy": content}), read_npz)
    assert not (tmp_path / "made").exists()


HEADER = npy(np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ({"x.npy": HEADER[:-1]}, r"damaged: x has 7 bytes for shape \(2,\)"),
        ({"x.npy": HEADER.replace(b"(2,)", b"(9,)")}, r"x has 8 bytes for shape \(9,\)"),
        ({"x.npy": HEADER.replace(b"(2,)", b"(-2,)").replace(b" \n", b"\n")}, "damaged: x has"),
        ({"x.npy": HEADER.replace(b"'<f4'", b"'<M8'")}, "x has elements of type datetime64; accepted"),
        ({"x.npy": HEADER.replace(b"{'descr'", b"__import")}, "damaged: x has no header of an array"),
        ({"x.npy": b"hello"}, "damaged: x has no header of an array"),
        ({"x.npy": HEADER, "notes.txt": b"hello"}, "record notes.txt: accepted are arrays, NAME.npy"),
        ({f"{'a' * 501}.npy": HEADER}, "a name of 505 characters"),
        ({"../x\n.npy": b""}, r"\.\./x\\n has no header"),
    ],
)
def test_a_damaged_or_hostile_archive_is_refused(tmp_path, records, reason):
    with pytest.raises(UserError, match=reason):
        read(tmp_path / "x", archive(records), read_npz)


def test_an_archive_that_unpacks_to_many_times_its_size_is_refused(tmp_path):
    content = archive({"x.npy": bytes(20 << 20)}, zipfile.ZIP_DEFLATED)
    assert len(content) < 1 << 20
    with pytest.raises(UserError, match="it would unpack to many times its size"):
        read(tmp_path / "x", content, read_npz)


def test_a_changed_byte_of_an_array_is_refused(tmp_path):
    content = bytearray(archive({"x.npy": HEADER}))
    content[content.index(HEADER) + len(HEADER) - 1] ^= 1
    with pytest.raises(UserError, match="wrong checksum"):
        read(tmp_path / "x", bytes(content), read_npz)
