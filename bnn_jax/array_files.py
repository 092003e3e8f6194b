"""Files of named arrays that are not trusted: ``.safetensors`` and ``.npz``, and what every reader of such files needs.

A file costs no more memory than 4 times its size and 64 MiB, and is refused within two seconds: what it says of itself
is checked against the limits below, and against its size, before memory is taken for it. Nothing in it is run: arrays
of objects, which numpy would unpickle, are refused.
"""

import io
import math
import os
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np

from bnn_jax import run_files
from bnn_jax.errors import UserError
from bnn_jax.restricted_pickle import MAX_KEY_LENGTH, shown

# The header of a ResNet-50 has 40 kB, that of an exported network with the 1,000 class names of ImageNet 60 kB.
MAX_HEADER_BYTES = 2 << 20
# A zip file's table of contents, or a pickle; those of a ResNet-20 with the state of its optimiser have 30 kB.
MAX_TABLE_BYTES = 4 << 20
MAX_ARRAYS = 5_000
# What arrays may take beyond twice the size of the file, where it is packed or has them share their numbers.
SPARE_BYTES = 8 << 20
PIECE = 1 << 20
ELEMENTS = {
    **{"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8"},
    **{"I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"},
}
LARGEST_SIZE = 2**31


class BoundedFile(io.BufferedReader):
    """A file of which nobody reads much at once: an archive says itself how long its table of contents is."""

    def read(self, size: int | None = -1) -> bytes:
        """As usual, but at most as much as a table of contents may have."""
        limit = MAX_TABLE_BYTES + 1 if size is None or size < 0 else size
        data = super().read(min(limit, MAX_TABLE_BYTES + 1))
        if len(data) > MAX_TABLE_BYTES:
            raise UserError("refused: its table of contents is larger than that of any checkpoint")
        return data


def check_names(names: Iterable[str], count: int) -> None:
    """Checks number and length of the names in a file.

    Raises:
      UserError: there are more, or longer ones, than any network has.
    """
    if count > MAX_ARRAYS:
        raise UserError(f"refused: {count} arrays; accepted are at most {MAX_ARRAYS}")
    for name in names:
        if len(name) > MAX_KEY_LENGTH:
            raise UserError(f"refused: a name of {len(name)} characters; accepted are at most {MAX_KEY_LENGTH}")


def check_packed(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Checks that a zip file does not declare many times its size: weights cannot be packed by much.

    Raises:
      UserError: it does.
    """
    if sum(record.file_size for record in archive.infolist()) > 2 * file_bytes + SPARE_BYTES:
        raise UserError("refused: it would unpack to many times its size")


def read_record(archive: zipfile.ZipFile, name: str, record: zipfile.ZipInfo | None) -> bytearray:
    """Content of a record, in pieces and no more than it declares, verified against its checksum.

    Raises:
      UserError: it is missing, damaged, or packed in an unusual way.
    """
    if record is None:
        raise UserError(f"damaged: record {shown(name)} is missing")
    if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or record.flag_bits & 1:
        raise UserError(f"record {shown(name)} is encrypted or packed in a way that is not read")
    content, end = bytearray(record.file_size), 0
    try:
        with archive.open(record) as stream:
            while piece := stream.read(PIECE):
                content[end : end + len(piece)] = piece
                end += len(piece)
    except zipfile.BadZipFile as error:
        raise UserError(f"damaged: record {shown(name)} has a wrong checksum or header") from error
    if end != record.file_size:
        raise UserError(f"damaged: record {shown(name)} is cut off")
    return content


# ---- .npz


def read_npz(file: BinaryIO) -> dict[str, np.ndarray]:
    """The arrays in a file of ``numpy.savez``, by name.

    Raises:
      UserError: it is damaged, hostile, or holds something else than arrays of numbers.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        check_names((record.filename for record in records), len(records))
        check_packed(archive, os.fstat(file.fileno()).st_size)
        arrays = {}
        for record in records:
            name = record.filename.removesuffix(".npy")
            if name == record.filename or name in arrays:
                raise UserError(f"record {shown(record.filename)}: accepted are arrays, NAME.npy, each once")
            arrays[name] = _read_npy(name, read_record(archive, record.filename, record))
    return arrays


def _read_npy(name: str, content: bytearray) -> np.ndarray:
    """The array in the format of ``numpy.save``, a view of the content."""
    head = io.BytesIO(content[:PIECE])
    try:
        version = np.lib.format.read_magic(head)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read_header[version](head)
    except Exception as error:  # The header is a Python literal, which can be wrong in any way.
        raise UserError(f"damaged: {shown(name)} has no header of an array") from error
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise UserError(f"{shown(name)} has elements of type {dtype}; accepted are integers, floats and booleans")
    raw = memoryview(content)[head.tell() :]
    if not all(0 <= size < LARGEST_SIZE for size in shape) or math.prod(shape) * dtype.itemsize != len(raw):
        raise UserError(f"damaged: {shown(name)} has {len(raw)} bytes for shape {shape}")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


# ---- .safetensors


def is_safetensors(head: bytes) -> bool:
    """Whether the first 9 bytes of a file are those of safetensors: the length of a JSON object, and its bracket."""
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def read_safetensors(file: BinaryIO) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Texts and arrays in a file of safetensors, by name; bfloat16 as float32.

    Raises:
      UserError: it is damaged or hostile.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > size - 8:
        raise UserError("damaged, or cut off: its header is longer than the file")
    if length > MAX_HEADER_BYTES:
        raise UserError(f"refused: a header of {length} bytes; accepted are at most {MAX_HEADER_BYTES}")
    try:
        header = run_files.parse(file.read(length))
    except ValueError as error:
        raise UserError(f"damaged: its header: {error}") from None
    if type(header) is not dict:
        raise UserError("damaged: its header is no table")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
        raise UserError("damaged: its metadata are no texts")
    check_names(header, len(header))
    data_bytes = size - 8 - length
    places = {name: _place(name, entry, data_bytes) for name, entry in header.items()}
    ends = [0, *sorted(end for _, _, _, end in places.values())]
    if [*sorted(begin for _, _, begin, _ in places.values()), data_bytes] != ends:
        raise UserError("damaged, or cut off: its arrays do not lie one behind another")
    return metadata, {name: _read_array(file, 8 + length, *place) for name, place in places.items()}


def _place(name: str, entry: Any, data_bytes: int) -> tuple[str, tuple[int, ...], int, int]:
    """Element type, shape, and first and last byte of an array, from its line of the header."""

    def sizes(key: str) -> list[int]:
        found = entry.get(key) if type(entry) is dict else None
        if type(found) is not list or not all(type(size) is int and 0 <= size <= 2**62 for size in found):
            raise UserError(f"damaged: {shown(name)}: {key}={shown(str(found)[:100])}")
        return found

    shape, offsets = sizes("shape"), sizes("data_offsets")
    dtype = entry.get("dtype")
    if type(dtype) is not str or dtype not in ELEMENTS:
        raise UserError(
            f"{shown(name)} has elements of type {shown(str(dtype)[:100])}; accepted: {', '.join(ELEMENTS)}"
        )
    if len(shape) > 32 or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        raise UserError(f"damaged: {shown(name)} lies outside of the file")
    if math.prod(shape) * np.dtype(ELEMENTS[dtype]).itemsize != offsets[1] - offsets[0]:
        raise UserError(f"damaged: {shown(name)} has {offsets[1] - offsets[0]} bytes for shape {shown(str(shape))}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _read_array(file: BinaryIO, start: int, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> np.ndarray:
    raw = bytearray(end - begin)
    file.seek(start + begin)
    if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise UserError("damaged, or cut off: an array is shorter than it says")
    array = np.frombuffer(raw, ELEMENTS[dtype])
    if dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(shape)
