"""Reads the arrays of a network from whatever file they lie in, under our paths; the content tells the format."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnn_jax.array_files import BoundedFile, is_safetensors, read_npz, read_safetensors
from bnn_jax.errors import UserError
from bnn_jax.storage.pytorch import convert_names, import_arrays, state_dict
from bnn_jax.storage.torch_files import LEGACY_MAGIC, errors_name, read_pytorch

FORMATS = (
    "read are files of PyTorch (.pth, .pt, .th, .pth.tar), .safetensors, .npz, exported networks (.bnn) and folders of "
    "checkpoints"
)
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# First parts of our own paths.
COLLECTIONS = ("params/", "batch_stats/", "quant_state/", "knobs/")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a network by our paths ('params/conv1/kernel'), not nested, in our layout.

    In ``.safetensors`` and ``.npz`` the names may be ours or PyTorch's.

    Raises:
      CheckpointError: one line that begins with the path: the file is missing, damaged, hostile or of another format.
    """
    with errors_name(path):
        if not path.is_file():
            raise UserError(f"no such file; {FORMATS}")
        with BoundedFile(io.FileIO(path)) as file:
            kind = _kind(file)
            if kind != "pytorch":
                file.seek(0)
                arrays = read_npz(file) if kind == "npz" else read_safetensors(file)[1]
                return _named(arrays)
    raw = read_pytorch(path)
    with errors_name(path):
        return convert_names(state_dict(raw))


def import_file(path: Path, target: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a network from a file; see ``import_arrays``.

    Raises:
      Misfit: the file is of another network.
      CheckpointError: it is missing, damaged, hostile or of another format.
    """
    return import_arrays(read_arrays(path), target)


def _kind(file: BoundedFile) -> str:
    """'pytorch', 'npz' or 'safetensors'.

    Raises:
      UserError: neither of them.
    """
    head = file.read(len(LEGACY_MAGIC))
    if head == LEGACY_MAGIC:
        return "pytorch"
    if is_safetensors(head[:9]):
        return "safetensors"
    if head.startswith(HDF5_MAGIC):
        raise UserError(f"a file of HDF5 (.h5, .keras); {FORMATS}")
    if not zipfile.is_zipfile(file):
        raise UserError(f"in no format that is read, or cut off; {FORMATS}")
    with zipfile.ZipFile(file) as archive:
        names = [record.filename for record in archive.infolist()]
    return "npz" if names and all(name.endswith(".npy") for name in names) else "pytorch"


def _named(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by our paths, whether they have them already or PyTorch's names."""
    if any(name.startswith(COLLECTIONS) for name in arrays):
        return arrays
    if any(name.endswith("/levels") for name in arrays):
        raise UserError("the weights in use of a stage, without the rest of the network; name the stage's folder")
    return convert_names(state_dict(arrays))
