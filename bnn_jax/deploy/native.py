"""The compiled kernels: the library, its instruction sets, and its structures (``kernels/runtime.h``)."""

import ctypes
import functools
import os
import warnings
from pathlib import Path

from bnn_jax.errors import UserError

# Forces an instruction set; by default the best one that this machine has.
VARIABLE = "BNN_JAX_INSTRUCTION_SET"

SOURCES = (
    "load",
    "conv_float",
    "conv_binary",
    "conv_codebook",
    "conv_bytes",
    "conv_shorts",
    "conv_depthwise",
    "pool_max",
    "pool_sum",
)
STEPS = (
    "affine",
    "divide",
    "add",
    "clip",
    "prelu",
    "round",
    "round_away",
    "sign",
    "threshold",
    "negate_some",
    "store_float",
    "store_signs",
    "store_planes",
    "store_bytes",
    "store_shorts",
)
CODEBOOK_TILE = 64


class CTensor(ctypes.Structure):
    """Where values lie: the address of (0, 0, 0, 0), and distances in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("image", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("pixel", ctypes.c_int64),
    ]


class CStep(ctypes.Structure):
    """What is done with a row of values."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("plane", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("tensor", CTensor),
    ]


class COperation(ctypes.Structure):
    """Where rows of values come from, and what is done with them."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                *("source", "step_count", "batch", "height", "width", "channels"),
                *("kernel_height", "kernel_width", "stride_y", "stride_x", "pad_top", "pad_left"),
                *("input_height", "input_width", "input_channels", "shift", "chunk", "patterns"),
            )
        ),
        ("input", CTensor),
        ("weights", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("steps", ctypes.POINTER(CStep)),
    ]


class CInstructionSet(ctypes.Structure):
    """Name, widths of tiles and kernels of an instruction set."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("float_tile", ctypes.c_int32),
        ("binary_tile", ctypes.c_int32),
        ("integer_tile", ctypes.c_int32),
        ("reads_nibbles", ctypes.c_int32),
        ("row", ctypes.c_void_p),
        ("tile", ctypes.c_void_p),
    ]


class Kernels:
    """One instruction set of the library.

    Attributes:
      name: 'avx512', 'avx2' or 'plain'.
      float_tile: output channels of a tile of the float convolution.
      binary_tile: of the binary convolution.
      integer_tile: of the convolutions of small integers.
      reads_nibbles: whether signs are stored as nibbles of four channels, else as words of 64.
    """

    def __init__(self, library: ctypes.CDLL, pointer: "ctypes._Pointer[CInstructionSet]"):
        self._library, self._pointer = library, pointer
        found = pointer.contents
        self.name = found.name.decode()
        self.float_tile, self.binary_tile = found.float_tile, found.binary_tile
        self.integer_tile, self.reads_nibbles = found.integer_tile, bool(found.reads_nibbles)

    def run(self, operations: "ctypes.Array[COperation]", threads: int = 1) -> None:
        """Runs the operations one after another, each divided over the threads; other Python threads go on."""
        if self._library.bnn_run(self._pointer, operations, len(operations), threads) != 0:
            raise MemoryError("inference: no memory for the rows of the threads")


def kernel_library() -> Path | None:
    """The compiled library beside this file, or None where the package was installed without a compiler."""
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    return found[0] if found else None


@functools.cache
def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.bnn_instruction_set.restype = ctypes.POINTER(CInstructionSet)
    library.bnn_is_available.argtypes = [ctypes.POINTER(CInstructionSet)]
    library.bnn_run.argtypes = [
        ctypes.POINTER(CInstructionSet),
        ctypes.POINTER(COperation),
        ctypes.c_int,
        ctypes.c_int,
    ]
    for which, structure in enumerate((COperation, CStep, CInstructionSet)):
        if library.bnn_size(which) != ctypes.sizeof(structure):
            raise OSError(f"{path}: compiled from another version; build it again")
    library.bnn_start()
    return library


def instruction_sets(path: Path | None = None) -> tuple[Kernels, ...]:
    """The instruction sets this machine can run, best first; none where there is no library."""
    path = kernel_library() if path is None else path
    if path is None:
        return ()
    library, found = _library(str(path)), []
    for index in range(8):
        pointer = library.bnn_instruction_set(index)
        if not pointer:
            break
        if library.bnn_is_available(pointer):
            found.append(Kernels(library, pointer))
    return tuple(found)


def choose(name: str | None = None) -> Kernels | None:
    """The kernels to use, or None for numpy.

    Args:
      name: 'avx512', 'avx2', 'plain' or 'numpy'; None takes the environment variable's, else the best one.

    Raises:
      UserError: this machine cannot run it.
    """
    origin = f"instruction_set={name!r}" if name else f"{VARIABLE}={os.environ.get(VARIABLE)}"
    name = name or os.environ.get(VARIABLE) or None
    if name == "numpy":
        return None
    try:
        found = instruction_sets()
    except OSError as error:
        warnings.warn(f"compiled kernels: {error}; numpy is used, which is slow", stacklevel=2)
        return None
    if name is None:
        if not found:
            warnings.warn("the kernels were not compiled at installation; numpy is used, which is slow", stacklevel=2)
        return found[0] if found else None
    for kernels in found:
        if kernels.name == name:
            return kernels
    accepted = ", ".join([*(kernels.name for kernels in found), "numpy"])
    raise UserError(f"{origin}: accepted on this machine are {accepted}")
