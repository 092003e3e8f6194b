"""Reads data out of pickles without running anything the file asks for.

A pickle is a program. Python's own ``Unpickler`` with a restricted ``find_class`` still lets a file set attributes of
what it was allowed to name, reserve as much memory as it declares, and hash a nest of shared tuples for hours. So the
few instructions that data needs are carried out here, one by one, over ``pickletools.genops`` of the standard library,
which only splits the bytes into instructions. Every other instruction, and every name that is not allowed, is refused.
"""

import dataclasses
import io
import math
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from bnn_jax.errors import UserError

# The largest known data set archive member (CIFAR-100, training) has 155 MB and 0.3 million instructions.
MAX_BYTES = 1 << 30
MAX_INSTRUCTIONS = 2_000_000

# Tuples are missing on purpose: hashing a nest of n shared tuples takes 2**n steps.
KEY_TYPES = (str, bytes, int, float, bool, type(None))

Allowed = Mapping[tuple[str, str], Any]


@dataclasses.dataclass(frozen=True)
class Buildable:
    """An allowed global whose objects get their content from a later BUILD instruction.

    Attributes:
      make: called with the arguments in the file; returns the object.
      build: called at most once with (object, state).
    """

    make: Callable[..., Any]
    build: Callable[[Any, Any], None]

    def __call__(self, *args: Any) -> Any:
        """The object, not built yet."""
        return self.make(*args)


class _Refused(Exception):
    """The file asks for something that is not allowed, or is no sound pickle; the message says what."""


def load(
    file: BinaryIO,
    *,
    allowed: Allowed,
    persistent_load: Callable[[Any], Any] | None = None,
    encoding: str = "ASCII",
) -> Any:
    """Reads one pickle (protocols 2 to 5) that holds nothing but plain data and the allowed globals.

    Plain data are None, booleans, numbers, strings, bytes, tuples, lists and dictionaries with plain keys; containers
    may be shared and may contain themselves.

    Args:
      file: binary file, read to its end.
      allowed: what stands for each (module, name) the file may use. A callable may be called by the file, so it has to
        check its arguments (any exception refuses the file); anything else is a mere value.
      persistent_load: turns a persistent id into a value; without it such an id is refused.
      encoding: of the 8-bit strings of Python 2; 'bytes' leaves them bytes.

    Returns:
      The object.

    Raises:
      UserError: the file is damaged, or asks for anything else; nothing it asks for has been run.
    """
    name = getattr(file, "name", None)
    label = ascii(name)[1:-1] if isinstance(name, str) else "pickle"
    machine = _Machine(allowed, persistent_load, encoding)
    try:
        return machine.run(_read(file))
    except UserError:
        raise
    except _Refused as error:
        raise UserError(f"{label}: refused: {error}; accepted is plain data only") from error
    except Exception as error:  # Whatever a damaged file makes the decoder or a stand-in raise, it is the file's fault.
        raise UserError(f"{label}: refused: damaged pickle ({type(error).__name__})") from error


def _read(file: BinaryIO) -> bytes:
    """The whole file, in pieces, so that an archive member cannot grow past the limit while it is unpacked."""
    pieces, size = [], 0
    while piece := file.read(1 << 20):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_BYTES:
            raise _Refused(f"it is larger than {MAX_BYTES} bytes")
    return b"".join(pieces)


def shown(value: str) -> str:
    """A name from an untrusted file, made fit for an error message: ASCII, printable, at most 80 characters."""
    text = ascii(value)[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Machine:
    """The stack machine that a pickle is a program for, with the instructions that make data."""

    def __init__(self, allowed: Allowed, persistent_load: Callable[[Any], Any] | None, encoding: str):
        self._allowed = allowed
        self._persistent_load = persistent_load
        self._encoding = encoding
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        # By id; the object is kept along with its function, so no other object can get its id.
        self._unbuilt: dict[int, tuple[Any, Callable[[Any, Any], None]]] = {}
        self._callables: set[int] = {id(target) for target in allowed.values() if callable(target)}

    def run(self, data: bytes) -> Any:
        """Carries out the program and returns its result."""
        end = 0
        for count, (opcode, argument, position) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count >= MAX_INSTRUCTIONS:
                raise _Refused(f"it has more than {MAX_INSTRUCTIONS} instructions")
            instruction = _INSTRUCTIONS.get(opcode.name)
            if instruction is None:
                raise _Refused(f"it uses the instruction {opcode.name}")
            instruction(self, argument)
            end = position or 0
        if len(self._stack) != 1 or self._marks or end + 1 != len(data):
            raise _Refused("it is damaged: something is left over at its end")
        return self._stack[0]

    def _pop(self) -> Any:
        if self._marks and self._marks[-1] == len(self._stack):
            raise _Refused("it is damaged: a mark where a value is expected")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _top(self, kind: type) -> Any:
        value = self._pop()
        self._stack.append(value)
        if type(value) is not kind:
            raise _Refused(f"it is damaged: {type(value).__name__} where a {kind.__name__} is expected")
        return value

    def push(self, value: Any) -> None:
        """A constant."""
        self._stack.append(value)

    def push_python2_string(self, text: str) -> None:
        """An 8-bit string; genops hands it over decoded as Latin-1, one character a byte."""
        data = text.encode("latin-1")
        self._stack.append(data if self._encoding == "bytes" else data.decode(self._encoding))

    def push_protocol(self, protocol: int) -> None:
        """The version in the first instruction."""
        if not 2 <= protocol <= 5:
            raise _Refused(f"it is of protocol {protocol}; accepted are 2 to 5")

    def mark(self, _: None) -> None:
        """Remembers the height of the stack."""
        self._marks.append(len(self._stack))

    def push_empty(self, kind: type) -> None:
        """A new container."""
        self._stack.append(kind())

    def tuple_to_mark(self, _: None) -> None:
        """A tuple of all values above the mark."""
        self._stack.append(tuple(self._pop_to_mark()))

    def tuple_of(self, length: int) -> None:
        """A tuple of the topmost values."""
        self._stack.append(tuple([self._pop() for _ in range(length)][::-1]))

    def append(self, _: None) -> None:
        """One value into the list below it."""
        value = self._pop()
        self._top(list).append(value)

    def appends(self, _: None) -> None:
        """All values above the mark into the list below."""
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def set_item(self, _: None) -> None:
        """One key and value into the dictionary below."""
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def set_items(self, _: None) -> None:
        """All keys and values above the mark into the dictionary below."""
        self._set_items(self._pop_to_mark())

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in KEY_TYPES:
                raise _Refused(f"a dictionary has a key of type {type(key).__name__}")
            target[key] = value

    def put(self, index: int) -> None:
        """Remembers the topmost value."""
        value = self._pop()
        self._stack.append(value)
        self._memo[index] = value

    def memoize(self, _: None) -> None:
        """Remembers the topmost value under the next number."""
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        """Pushes a remembered value."""
        self._stack.append(self._memo[index])

    def push_global(self, names: str) -> None:
        """What stands for a global given in the instruction."""
        module, _, name = names.partition(" ")
        self._push_global(module, name)

    def push_global_from_stack(self, _: None) -> None:
        """What stands for a global given by two strings on the stack."""
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise _Refused("it is damaged: a global without a name")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        if (module, name) not in self._allowed:
            raise _Refused(f"it asks for {shown(f'{module}.{name}')}, which is not allowed and was not run")
        self._stack.append(self._allowed[module, name])

    def call(self, _: None) -> None:
        """Calls what stands for a global."""
        arguments, function = self._pop(), self._pop()
        if id(function) not in self._callables or type(arguments) is not tuple:
            raise _Refused("it calls something that is no function")
        result = function(*arguments)
        if isinstance(function, Buildable):
            self._unbuilt[id(result)] = (result, function.build)
        self._stack.append(result)

    def build(self, _: None) -> None:
        """Gives the object below its state, if it was made to get one and has none yet."""
        state, target = self._pop(), self._pop()
        if id(target) not in self._unbuilt:
            raise _Refused(f"it changes an object of type {type(target).__name__}")
        _, build = self._unbuilt.pop(id(target))
        build(target, state)
        self._stack.append(target)

    def load_persistent(self, _: None) -> None:
        """The value a persistent id stands for."""
        if self._persistent_load is None:
            raise _Refused("it refers to data outside of itself")
        self._stack.append(self._persistent_load(self._pop()))

    def skip(self, _: Any) -> None:
        """Nothing: a mere hint, or the end."""


def _fixed(method: Callable[[_Machine, Any], None], value: Any) -> Callable[[_Machine, Any], None]:
    """An instruction whose argument is implied by its name."""
    return lambda machine, _: method(machine, value)


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.push_protocol,
    "FRAME": _Machine.skip,
    "STOP": _Machine.skip,
    "MARK": _Machine.mark,
    "NONE": _fixed(_Machine.push, None),
    "NEWTRUE": _fixed(_Machine.push, True),
    "NEWFALSE": _fixed(_Machine.push, False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _Machine.push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _Machine.push_python2_string),
    "EMPTY_TUPLE": _fixed(_Machine.push_empty, tuple),
    "EMPTY_LIST": _fixed(_Machine.push_empty, list),
    "EMPTY_DICT": _fixed(_Machine.push_empty, dict),
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": _fixed(_Machine.tuple_of, 1),
    "TUPLE2": _fixed(_Machine.tuple_of, 2),
    "TUPLE3": _fixed(_Machine.tuple_of, 3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.push_global,
    "STACK_GLOBAL": _Machine.push_global_from_stack,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.load_persistent,
}


# A value, not a class: the file may name it as an argument, but not call it.
_NDARRAY = "numpy.ndarray"


class _ArrayType:
    """The element type of an array while its pickle is read."""

    def __init__(self, code: str | bytes, align: bool = False, copy: bool = True):
        text = code.decode("ascii") if isinstance(code, bytes) else code
        if not re.fullmatch(r"[iu][1248]|f[248]|b1", text):
            raise _Refused(f"an array has elements of type {shown(text)}; accepted are integers, floats and booleans")
        self.code = text

    def build(self, state: tuple) -> None:
        """Takes the state numpy writes: (version, byte order, sub-array, names, fields, ...)."""
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        # Little-endian only: numpy copies swapped arrays, so a file could repeat one of them until the memory is full.
        if order not in ("<", "|", "=") or any(part is not None for part in state[2:5]):
            raise _Refused("an array has elements that are big-endian or records; accepted are little-endian numbers")


def numpy_globals() -> dict[tuple[str, str], Any]:
    """Allowed globals for pickles that hold numpy arrays of numbers, as in the official CIFAR archives.

    Arrays of objects, strings and records are refused. Make a new set for each file.
    """
    import numpy as np

    encoded: dict[str, bytes] = {}

    def make_array(kind: Any, shape: tuple, code: str | bytes) -> np.ndarray:
        if kind is not _NDARRAY or shape != (0,):
            raise _Refused("it is damaged: an array of an unknown kind")
        return np.empty((0,), np.int8)

    def build_array(array: np.ndarray, state: tuple) -> None:
        _, shape, element, fortran, data = state
        raw = encode(data, "latin-1") if isinstance(data, str) else data
        dtype = np.dtype(f"<{element.code}")
        sound = len(shape) <= 32 and all(type(size) is int and size >= 0 for size in shape)
        if not sound or math.prod(shape) * dtype.itemsize != len(raw):
            raise _Refused("it is damaged: an array's shape does not fit its content")
        array.__setstate__((1, tuple(shape), dtype, bool(fortran), raw))  # type: ignore[arg-type]

    def encode(text: str, codec: str) -> bytes:
        if codec not in ("latin1", "latin-1") or type(text) is not str:
            raise _Refused("it is damaged: bytes in an unknown encoding")
        # One copy a string, so that repeating the call cannot fill the memory.
        if text not in encoded:
            encoded[text] = text.encode("latin-1")
        return encoded[text]

    array_maker = Buildable(make_array, build_array)
    return {
        ("numpy.core.multiarray", "_reconstruct"): array_maker,
        ("numpy._core.multiarray", "_reconstruct"): array_maker,
        ("numpy", "ndarray"): _NDARRAY,
        ("numpy", "dtype"): Buildable(_ArrayType, _ArrayType.build),
        ("_codecs", "encode"): encode,
    }
