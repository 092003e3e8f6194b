"""The file formats of ``torch.save``: a zip archive since PyTorch 1.6, before that pickles followed by raw numbers.

A file costs no more memory than 4 times its size and 64 MiB, and is refused within two seconds: what it says of itself
is checked against the limits below and in ``array_files``, and against its size, before memory is taken for it.
"""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from bnn_jax import restricted_pickle
from bnn_jax.array_files import (
    MAX_ARRAYS,
    MAX_TABLE_BYTES,
    SPARE_BYTES,
    BoundedFile,
    check_packed,
    read_record,
)
from bnn_jax.errors import CheckpointError, UserError
from bnn_jax.restricted_pickle import shown

# torch.save wrote this number, as a pickle, in front of everything before PyTorch 1.6.
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_VERSION = 1001

# The pickle of a ResNet-20 with the state of its optimiser has 27 kB and 7,500 instructions for 200 tensors.
MAX_PICKLE_BYTES = MAX_TABLE_BYTES
MAX_INSTRUCTIONS = 250_000
MAX_TENSORS = MAX_ARRAYS


@contextlib.contextmanager
def errors_name(path: str | os.PathLike) -> Iterator[None]:
    """Makes every error on the way a CheckpointError of one line that begins with the path."""
    try:
        yield
    except CheckpointError as error:
        error.args = (f"{path}: {error}",)
        raise
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Whatever a damaged file makes zipfile, zlib or numpy raise, it is the file's fault.
        raise CheckpointError(f"{path}: damaged ({type(error).__name__})") from error


def read_pytorch(path: str | os.PathLike) -> dict:
    """Everything in a file of ``torch.save``: tensors as arrays, plain scalars and containers as they are.

    Args:
      path: the file.

    Returns:
      The saved dictionary; arrays are read-only and in PyTorch's layout.

    Raises:
      CheckpointError: no such file, a damaged file, or one that asks for anything but tensors and plain data.
    """
    with errors_name(path):
        if not Path(path).exists():
            raise UserError("no such file; accepted is a PyTorch checkpoint (.pth, .pt, .th, .pth.tar)")
        if not Path(path).is_file():
            raise UserError("not a file; accepted is a PyTorch checkpoint (.pth, .pt, .th, .pth.tar)")
        with BoundedFile(io.FileIO(path)) as file:
            legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
            if not legacy and not zipfile.is_zipfile(file):
                raise UserError("not a PyTorch checkpoint, or cut off; accepted are files of torch.save")
            content = _read_legacy(file) if legacy else _read_zip(file)
        if type(content) is not dict:
            raise UserError(f"holds a {type(content).__name__}; accepted is a dictionary")
        return content


class _Tensors:
    """Makes tensors as a pickle asks for them, within limits."""

    def __init__(self, read: Callable[[str, int], Any], *, file_bytes: int, byte_order: Literal["<", ">"] = "<"):
        """Starts with none.

        Args:
          read: gives the raw numbers of a storage, from its key and length in bytes.
          file_bytes: size of the file.
          byte_order: '<' or '>'.
        """
        self._read = read
        self._byte_order: Literal["<", ">"] = byte_order
        self._storages: dict[str, np.ndarray] = {}
        self._count = 0
        self._bytes_left = 2 * file_bytes + SPARE_BYTES

    def load(self, file: BinaryIO) -> Any:
        """Reads a pickle with the globals that the files name."""
        allowed = {
            ("collections", "OrderedDict"): lambda: {},
            ("torch", "FloatStorage"): np.dtype(np.float32),
            ("torch", "LongStorage"): np.dtype(np.int64),
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        return restricted_pickle.load(
            file,
            allowed=allowed,
            # PyTorch hangs a table of versions on its ordered dictionaries.
            build={dict: lambda target, state: None},
            persistent_load=self._storage,
            encoding="utf-8",
            max_instructions=MAX_INSTRUCTIONS,
        )

    def _storage(self, identifier: Any) -> np.ndarray:
        """What a persistent id ('storage', element type, key, device, elements[, view]) stands for: (elements,)."""
        kind, dtype, key, _, elements, *view = identifier
        sound = isinstance(dtype, np.dtype) and type(key) is str and type(elements) is int and elements >= 0
        if kind != "storage" or not sound or view not in ([], [None]):
            raise UserError("damaged: a storage of an unknown kind")
        if key not in self._storages:
            raw = self._read(key, elements * dtype.itemsize)
            self._storages[key] = np.frombuffer(raw, dtype.newbyteorder(self._byte_order))
            self._storages[key].flags.writeable = False
        storage = self._storages[key]
        if storage.dtype.newbyteorder("=") != dtype or storage.size != elements:
            raise UserError(f"damaged: storage {shown(key)} is used with two types or sizes")
        return storage

    def _tensor(self, storage: Any, offset: Any, sizes: Any, strides: Any, *_: Any) -> np.ndarray:
        """A view of ``sizes`` into a storage, all counted in elements; numpy checks that it does not leave it."""
        if not isinstance(storage, np.ndarray) or type(sizes) is not tuple or type(strides) is not tuple:
            raise UserError("damaged: a tensor without a storage or a shape")
        if not all(type(number) is int and number >= 0 for number in (offset, *sizes, *strides)):
            raise UserError("damaged: a tensor with a negative or malformed shape")
        self._count += 1
        self._bytes_left -= math.prod(sizes) * storage.itemsize
        if self._count > MAX_TENSORS:
            raise UserError(f"refused: it has more than {MAX_TENSORS} tensors")
        if self._bytes_left < 0:
            raise UserError("damaged, or refused: its tensors have many times the size of the file")
        steps = tuple(stride * storage.itemsize for stride in strides)
        return np.ndarray(sizes, storage.dtype, storage.data, offset * storage.itemsize, steps)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> np.ndarray:
    """A tensor saved as a parameter, as in the ImageNet weights of torchvision: the tensor."""
    if not isinstance(data, np.ndarray):
        raise UserError("damaged: a parameter without a tensor")
    return data


def _read_zip(file: BinaryIO) -> Any:
    """Content of an archive: one folder with ``data.pkl`` and one record of raw numbers per storage."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        # PyTorch does not compress; others may.
        check_packed(archive, size)
        roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(records) != len(archive.infolist()):
            raise UserError("not a PyTorch checkpoint: a zip file without exactly one 'data.pkl'")

        def record(name: str) -> bytearray:
            return read_record(archive, name, records.get(f"{roots[0]}{name}"))

        def storage(key: str, length: int) -> bytearray:
            content = record(f"data/{key}")
            if len(content) != length:
                raise UserError(f"damaged: record data/{shown(key)} has {len(content)} bytes, {length} expected")
            return content

        order = bytes(record("byteorder")) if f"{roots[0]}byteorder" in records else b"little"
        if order not in (b"little", b"big"):
            raise UserError(f"byte order {shown(order.decode('latin-1'))}; accepted are little, big")
        tensors = _Tensors(storage, file_bytes=size, byte_order="<" if order == b"little" else ">")
        pickled = record("data.pkl")
        if len(pickled) > MAX_PICKLE_BYTES:
            raise UserError(f"refused: a pickle of {len(pickled)} bytes; accepted are at most {MAX_PICKLE_BYTES}")
        return tensors.load(io.BytesIO(pickled))


def _read_legacy(file: BinaryIO) -> Any:
    """Content of a file from before PyTorch 1.6: four pickles behind the magic one, then the storages by their keys."""
    size = os.fstat(file.fileno()).st_size
    head = io.BytesIO(file.read(MAX_PICKLE_BYTES - 1))
    raw: dict[str, bytearray] = {}
    bytes_left = size

    def allocate(key: str, length: int) -> bytearray:
        nonlocal bytes_left
        bytes_left -= length
        if bytes_left < 0:
            raise UserError("damaged: its tensors are larger than the file")
        raw[key] = bytearray(length)
        return raw[key]

    tensors = _Tensors(allocate, file_bytes=size)
    version, system, content, keys = (tensors.load(head) for _ in range(4))
    if version != LEGACY_VERSION or type(system) is not dict or system.get("little_endian") is not True:
        raise UserError("a PyTorch file of an unknown version or byte order; save it again with a newer PyTorch")
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(raw):
        raise UserError("damaged: other tensors than it lists")
    file.seek(len(LEGACY_MAGIC) + head.tell())
    for key in keys:
        elements = int.from_bytes(file.read(8), "little")
        view = memoryview(raw[key])
        # Four or eight bytes an element: the pickle has said which.
        if elements not in (len(view) // 4, len(view) // 8) or file.readinto(view) != len(view):
            raise UserError("damaged, or cut off: a tensor of another length than it says")
    return content
