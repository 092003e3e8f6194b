"""Reads data out of pickles without running anything the file asks for.

A pickle is a program. It is read here by Python's own ``Unpickler``, of which only the instructions that make data are
left: names stand for what the caller gives, and objects get their state from the caller's functions. The one written in
Python is used, since the one in C asks nobody before it hashes a key or sets an attribute. What would cost more than it
weighs is refused while it is read.
"""

import math
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from bnn_jax.errors import UserError

# The largest known file, CIFAR-100's training images, has 0.3 million instructions.
MAX_INSTRUCTIONS = 500_000
MAX_KEY_LENGTH = 500
# Of longer integers, any number can be made that have the same hash.
MAX_INTEGER_BYTES = 8
# Tuples are missing on purpose: hashing a nest of n shared tuples takes 2**n steps.
KEY_TYPES = (str, bytes, int, float, bool, type(None))

INSTRUCTIONS = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING EMPTY_TUPLE EMPTY_LIST EMPTY_DICT TUPLE
    TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL
    STACK_GLOBAL REDUCE BUILD BINPERSID
"""


def load(
    file: BinaryIO,
    *,
    allowed: Mapping[tuple[str, str], Any],
    build: Mapping[type, Callable[[Any, Any], None]],
    persistent_load: Callable[[Any], Any] | None = None,
    encoding: str = "ASCII",
    max_instructions: int = MAX_INSTRUCTIONS,
) -> Any:
    """Reads one pickle (protocols 2 to 5) that holds nothing but plain data and the allowed globals.

    Plain data are None, booleans, numbers, strings, bytes, tuples, lists and dictionaries with plain keys; containers
    may be shared and may contain themselves.

    Args:
      file: binary file in memory; it is left behind the pickle.
      allowed: what stands for each (module, name) the file may use. A callable may be called by the file, so it has to
        check its arguments (any exception refuses the file); anything else is a mere value.
      build: by type of an object, what gives it the state in the file: called with (object, state).
      persistent_load: turns a persistent id into a value; without it such an id is refused.
      encoding: of the 8-bit strings of Python 2; 'bytes' leaves them bytes.
      max_instructions: a file with more is refused.

    Returns:
      The object.

    Raises:
      UserError: the file is damaged, or asks for anything else; nothing it asks for has been run.
    """
    try:
        given = {"allowed": allowed, "build": build, "persistent_load": persistent_load}
        return _Unpickler(file, encoding, max_instructions=max_instructions, **given).load()
    except UserError:
        raise
    except Exception as error:  # Whatever a damaged file makes the decoder or a stand-in raise, it is the file's fault.
        raise UserError(f"pickle: refused: damaged pickle ({type(error).__name__})") from error


def shown(value: str) -> str:
    """A name from an untrusted file, made fit for an error message: ASCII, printable, at most 80 characters."""
    text = ascii(value[:100])[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refused(what: str) -> UserError:
    return UserError(f"pickle: refused: {what}; accepted is plain data only")


class _Instructions(dict[int, Callable[[Any], None]]):
    """What carries out each instruction that is left; it counts them, too."""

    def __init__(self, limit: int):
        codes = {getattr(pickle, name)[0]: name for name in INSTRUCTIONS.split()}
        super().__init__((code, pickle._Unpickler.dispatch[code]) for code in codes)
        own = {code: getattr(_Unpickler, f"load_{name.lower()}", None) for code, name in codes.items()}
        self.update({code: function for code, function in own.items() if function is not None})
        self._limit = self._left = limit

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._left -= 1
        if self._left < 0:
            raise _refused(f"it has more than {self._limit} instructions")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Any:
        known = pickletools.code2op.get(chr(code))
        raise _refused(f"it uses the instruction {known.name if known else hex(code)}")


class _Unpickler(pickle._Unpickler):
    """Python's with few instructions, some of them stricter."""

    def __init__(self, file: BinaryIO, encoding: str, *, max_instructions: int, **given: Any):
        super().__init__(file, encoding=encoding)
        self.dispatch = _Instructions(max_instructions)
        self._given = given

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global."""
        if (module, name) not in self._given["allowed"]:
            raise _refused(f"it asks for {shown(f'{module}.{name}')}, which is not allowed and was not run")
        return self._given["allowed"][module, name]

    def persistent_load(self, pid: Any) -> Any:
        """The value a persistent id stands for."""
        if self._given["persistent_load"] is None:
            raise _refused("it refers to data outside of itself")
        return self._given["persistent_load"](pid)

    def load_build(self) -> None:
        """Gives the object below its state, if there is a function for its type."""
        state, target = self.stack.pop(), self.stack[-1]
        build = self._given["build"].get(type(target))
        if build is None:
            raise _refused(f"it changes an object of type {type(target).__name__}")
        build(target, state)

    def load_long1(self) -> None:
        """A long integer."""
        length = self.read(1)[0]
        if length > MAX_INTEGER_BYTES:
            raise _refused(f"it has an integer of {length} bytes")
        self.append(pickle.decode_long(self.read(length)))

    def load_setitem(self) -> None:
        """One key and value into the dictionary below."""
        pair = self.stack[-2:]
        del self.stack[-2:]
        self._set(pair)

    def load_setitems(self) -> None:
        """All keys and values above the mark into the dictionary below."""
        self._set(self.pop_mark())

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise _refused(f"it is damaged: {type(target).__name__} where a dict is expected")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in KEY_TYPES:
                raise _refused(f"a dictionary has a key of type {type(key).__name__}")
            if isinstance(key, (str, bytes)) and len(key) > MAX_KEY_LENGTH:
                raise _refused(f"a dictionary has a key of {len(key)} characters")
            target[key] = value


# ---- arrays of numpy

# A value, not a class: the file may name it as an argument, but not call it.
_NDARRAY = "numpy.ndarray"


class _ElementType:
    """The element type of an array while its pickle is read."""

    def __init__(self, code: str | bytes, align: bool = False, copy: bool = True):
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        if not re.fullmatch(r"[iu][1248]|f[248]|b1", self.code):
            accepted = "integers, floats and booleans"
            raise _refused(f"an array has elements of type {shown(self.code)}, not {accepted}")

    def check(self, state: tuple) -> None:
        """Takes the state numpy writes: (version, byte order, sub-array, names, fields, ...)."""
        # Little-endian only: numpy copies swapped arrays, so a file could repeat one of them until the memory is full.
        if state[1] not in ("<", "|", "=", b"<", b"|", b"=") or any(part is not None for part in state[2:5]):
            raise _refused("an array has elements that are big-endian or records")


def load_arrays(file: BinaryIO) -> Any:
    """Reads a pickle that holds numpy arrays of numbers too, as the official CIFAR archives do; see ``load``.

    Arrays of objects, strings and records are refused. Integers of numpy become those of Python, strings of Python 2
    bytes.

    Args:
      file: binary file in memory.

    Raises:
      UserError: the file is damaged, or asks for anything else; nothing it asks for has been run.
    """
    import numpy as np

    encoded: dict[str, bytes] = {}

    def make(kind: Any, shape: tuple, code: str | bytes) -> np.ndarray:
        if kind is not _NDARRAY or shape != (0,):
            raise _refused("it is damaged: an array of an unknown kind")
        return np.empty((0,), np.int8)

    def build(array: np.ndarray, state: tuple) -> None:
        _, shape, element, fortran, data = state
        raw = encode(data, "latin-1") if isinstance(data, str) else data
        dtype = np.dtype(f"<{element.code}")
        sound = len(shape) <= 32 and all(type(size) is int and size >= 0 for size in shape)
        if not sound or math.prod(shape) * dtype.itemsize != len(raw):
            raise _refused("it is damaged: an array's shape does not fit its content")
        array.__setstate__((1, tuple(shape), dtype, bool(fortran), raw))  # type: ignore[arg-type]

    def scalar(element: _ElementType, content: bytes) -> int:
        if not re.fullmatch(r"[iu][1248]", element.code) or len(content) != int(element.code[1]):
            raise _refused("it is damaged: no integer")
        return int.from_bytes(content, "little", signed=element.code[0] == "i")

    def encode(text: str, codec: str) -> bytes:
        if codec not in ("latin1", "latin-1") or type(text) is not str:
            raise _refused("it is damaged: bytes in an unknown encoding")
        # One copy a string, so that repeating the call cannot fill the memory.
        if text not in encoded:
            encoded[text] = text.encode("latin-1")
        return encoded[text]

    allowed: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _NDARRAY, ("numpy", "dtype"): _ElementType}
    for core in ("core", "_core"):
        allowed |= {(f"numpy.{core}.multiarray", "_reconstruct"): make, (f"numpy.{core}.multiarray", "scalar"): scalar}
    allowed["_codecs", "encode"] = encode
    return load(file, allowed=allowed, build={np.ndarray: build, _ElementType: _ElementType.check}, encoding="bytes")
