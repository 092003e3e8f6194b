import contextlib
import copyreg
import io
import os
import pickle
import random
import struct
import time

import numpy as np
import pytest

from bnn_jax import restricted_pickle
from bnn_jax.errors import UserError

START = b"\x80\x02"
MAKES_NUMBER = {("here", "number"): lambda: 7}


def load(data: bytes, allowed=None, **options):
    return restricted_pickle.load(io.BytesIO(data), allowed=allowed or {}, **{"build": {}, **options})


def load_arrays(data: bytes):
    return restricted_pickle.load_arrays(io.BytesIO(data))


class Command:
    """Pickles as a call of os.system that creates a file."""

    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


class Stateful:
    """Pickles as NEWOBJ and BUILD."""

    def __init__(self):
        self.value = 1

    def __setstate__(self, state):
        raise AssertionError("the file's state was set")


PLAIN = {
    "none": None,
    "flags": [True, False],
    "numbers": (0, 1, -1, 255, 65535, 2**31 - 1, -(2**40), 0.5, float("inf")),
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "text": ["", "a", "ä\N{SNOWMAN}", "x" * 300],
    3: {"nested": {None: [], 2.5: {}}},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_equal_those_of_pickle(protocol):
    assert load(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes_equal_those_of_pickle(protocol):
    value = [b"", b"ab", bytes(range(256)) * 2]
    assert load(pickle.dumps(value, protocol)) == value


def test_shared_containers_stay_shared():
    inner = [1]
    first, second = load(pickle.dumps([inner, inner]))
    assert first is second


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.arange(5000, dtype=np.float32),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([True, False]),
        np.float16([[1.5]]),
        np.array(3, np.int64),
    ],
    ids=["uint8", "large", "fortran", "bool", "float16", "scalar"],
)
def test_number_arrays_equal_those_of_pickle(array, protocol):
    read = load_arrays(pickle.dumps({"x": array}, protocol))["x"]
    assert type(read) is np.ndarray and read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def python2_archive() -> bytes:
    """{'data': uint8 array (2, 2), 'labels': [3, 4]} as Python 2 pickled the CIFAR archives."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x02K\x02\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x04\x00\x7f\x80\xfftb"
    )
    return START + b"}(U\x04data" + array + b"U\x06labels](K\x03K\x04eu."


def test_python2_archive_with_byte_keys():
    read = load_arrays(python2_archive())
    assert read[b"labels"] == [3, 4]
    np.testing.assert_array_equal(read[b"data"], np.uint8([[0, 127], [128, 255]]))


def test_python2_strings_outside_the_encoding_are_an_error():
    with pytest.raises(UserError, match="UnicodeDecodeError"):
        load(START + b"U\x01\xff.")


def test_unnamed_python2_strings_match_pickle():
    data = START + b"U\x02ab."
    assert load(data, encoding="bytes") == pickle.loads(data, encoding="bytes") == b"ab"
    assert load(data) == pickle.loads(data) == "ab"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_command_is_refused_and_not_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    with pytest.raises(UserError, match=r"refused: it (asks for (posix|nt)\.system|uses the instruction)"):
        load_arrays(pickle.dumps([Command(marker)], protocol))
    assert not marker.exists()


def test_the_command_would_run_under_pickle(tmp_path):
    """The test above would see it if the command ran."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Command(marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (START + b"cbuiltins\neval\n(X\x05\x00\x00\x001 + 1tR.", r"builtins\.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", r"builtins\.eval"),
        (b"\x80\x04\x8c\x08builtins\x94\x8c\x04eval\x940h\x00h\x01\x93.", "POP"),
        (b"\x80\x04\x8c\x08builtins\x94\x8c\x04eval\x94h\x00h\x01\x93.", r"builtins\.eval"),
        (START + b"(S'echo'\nios\nsystem\n.", "STRING"),
        (START + b"(ios\nsystem\n.", "INST"),
        (START + b"(cbuiltins\neval\no.", r"builtins\.eval"),
        (START + b"(K\x01o.", "OBJ"),
        (START + b")\x81.", "NEWOBJ"),
        (b"\x80\x04)}\x92.", "NEWOBJ_EX"),
        (START + b"P1\n.", "PERSID"),
        (START + b"K\x01Q.", "data outside of itself"),
        (START + b"K\x01)R.", "TypeError"),
        (START + b"X\x04\x00\x00\x00eval)R.", "TypeError"),
        (START + b"}}b.", "changes an object of type dict"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x06N.", "ValueError"),
        (START + b"cbuiltins\n" + b"x" * 500 + b"\n.", r"x\.\.\., which"),
        (START + b"cbuiltins\n\x1b[2J\n.", r"\\x1b"),
        (START + b"Kx0.", "POP"),
        (START + b".", "IndexError"),
        (START + b"(e.", "IndexError"),
        (START + b"](K\x01a.", "IndexError"),
        (START + b"}K\x01a.", "AttributeError"),
        (START + b"]K\x01K\x01s.", "list where a dict"),
        (START + b"\x8a\x09" + bytes(9) + b".", "integer of 9 bytes"),
        (START + b"}X\xf5\x01\x00\x00" + b"a" * 501 + b"Ns.", "a key of 501 characters"),
        (START + b"}]K\x01s.", "key of type list"),
        (START + b"}(K\x01u.", "ValueError"),
        (START + b"h\x05.", "UnpicklingError"),
        (b"\x80\x04K\x01K\x02\x93.", "UnpicklingError"),
        (b"", "EOFError"),
        (b"not a pickle", "refused"),
    ],
)
def test_anything_but_data_is_refused(data, reason):
    with pytest.raises(UserError, match=reason) as caught:
        load(data)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_the_extension_registry_is_not_used():
    copyreg.add_extension("os", "system", 0xF0F0)
    try:
        for opcode in (b"\x82\x01", b"\x83\xf0\xf0", b"\x84\xf0\xf0\x00\x00"):
            with pytest.raises(UserError, match="EXT"):
                load(START + opcode + b".")
    finally:
        copyreg.remove_extension("os", "system", 0xF0F0)


def test_objects_with_setstate_are_refused():
    with pytest.raises(UserError, match="Stateful"):
        load(pickle.dumps(Stateful(), 2))


def test_attributes_of_an_allowed_name_are_refused():
    # From protocol 4 on pickle follows dots in a name.
    with pytest.raises(UserError, match="asks for"):
        load_arrays(b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.")


def test_an_allowed_callable_is_called_with_the_files_arguments():
    assert load(START + b"chere\nnumber\n)R.", MAKES_NUMBER) == 7


def test_wrong_arguments_of_an_allowed_callable_are_an_error():
    with pytest.raises(UserError, match="TypeError"):
        load(START + b"chere\nnumber\nK\x01\x85R.", MAKES_NUMBER)


@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x0c\x00\x00\x00__defaults__)s\x86"])
def test_attributes_of_an_allowed_callable_cannot_be_set(state):
    def function():
        return 7

    with pytest.raises(UserError, match="changes an object of type function"):
        load(START + b"chere\nfunction\n" + state + b"b.", {("here", "function"): function})
    assert not vars(function) and function.__defaults__ is None


def test_an_object_gets_its_state_by_the_given_function():
    states = []
    data = START + b"chere\nmade\n)RK\x01b."
    allowed = {("here", "made"): dict}
    assert load(data, allowed, build={dict: lambda target, state: states.append(state)}) == {}
    assert states == [1]
    with pytest.raises(UserError, match="changes an object of type dict"):
        load(data, allowed)


def test_persistent_ids_go_to_the_given_function():
    assert load(START + b"K\x05Q.", persistent_load=lambda value: value + 1) == 6


def test_an_error_of_the_given_function_is_passed_on():
    def fail(_):
        raise UserError("no such record")

    with pytest.raises(UserError, match=r"^no such record$"):
        load(START + b"K\x05Q.", persistent_load=fail)


def test_a_key_made_of_shared_tuples_does_not_take_forever():
    # 60 doublings: hashing this key would take 2**60 steps.
    nest = b"](K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"e"
    begin = time.monotonic()
    with pytest.raises(UserError, match="key of type tuple"):
        load(START + nest + b"}h\x00K\x01s\x86.")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x03\x8e" + struct.pack("<Q", 1 << 62) + b"ab.",
        b"\x80\x03B" + struct.pack("<I", 0xFFFFFFFF) + b"ab.",
        START + b"X" + struct.pack("<I", 0xFFFFFFFF) + b"ab.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"X" + struct.pack("<I", 0xFFFFFFFF) + b"ab.",
        START + b"\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"ab.",
    ],
    ids=["BINBYTES8", "BINBYTES", "BINUNICODE", "FRAME", "LONG4"],
)
def test_a_declared_length_beyond_the_file_is_an_error(data):
    with pytest.raises(UserError, match="refused"):
        load(data)


def test_a_huge_memo_number_takes_no_memory():
    assert load(START + b"K\x07r\xff\xff\xff\xff.") == 7


def test_the_number_of_instructions_is_limited():
    with pytest.raises(UserError, match="more than 10 instructions"):
        load(pickle.dumps(list(range(10)), 2), max_instructions=10)


def array_pickle(
    *, shape=b"K\x02\x85", code=b"u1", order=b"|", data=b"ab", made=b"K\x00\x85U\x01bt", names=b"N"
) -> bytes:
    """Pickle of an array with any part exchanged."""
    return (
        START
        + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        + made
        + b"R(K\x01"
        + shape
        + b"cnumpy\ndtype\n(U"
        + bytes([len(code)])
        + code
        + b"K\x00K\x01tR(K\x03U\x01"
        + order
        + b"N"
        + names
        + b"NJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
        + bytes([len(data)])
        + data
        + b"tb."
    )


def test_the_hand_made_array_is_sound():
    np.testing.assert_array_equal(load_arrays(array_pickle()), np.uint8([97, 98]))


@pytest.mark.parametrize(
    "parts",
    [
        {"shape": b"K\x03\x85"},
        {"shape": b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86"},
        {"shape": b"K\x02"},
        {"shape": b"G?\xf0\x00\x00\x00\x00\x00\x00\x85"},
        {"shape": b"(" + b"K\x01" * 40 + b"K\x02t"},
        {"code": b"u4"},
        {"code": b"O8"},
        {"code": b"S1"},
        {"code": b"f1"},
        {"code": b"V2"},
        {"order": b">"},
        {"names": b"U\x01a\x85"},
        {"made": b"J\xff\xff\xff\x7f\x85U\x01bt"},
        {"made": b"K\x00\x85t"},
    ],
    ids=lambda parts: "-".join(f"{key}{value!r}"[:30] for key, value in parts.items()),
)
def test_malformed_arrays_are_refused(parts):
    with pytest.raises(UserError, match="refused"):
        load_arrays(array_pickle(**parts))


@pytest.mark.parametrize(
    "array",
    [
        np.array([print, None], dtype=object),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, [("a", np.int32)]),
        np.array([1], ">i4"),
        np.array([1j]),
        np.array(["2020-01-01"], "datetime64[D]"),
    ],
    ids=["object", "text", "bytes", "record", "big-endian", "complex", "time"],
)
def test_arrays_of_anything_but_little_endian_numbers_are_refused(array):
    with pytest.raises(UserError, match="refused"):
        load_arrays(pickle.dumps(array, 2))


def test_the_array_class_cannot_be_called():
    with pytest.raises(UserError, match="TypeError"):
        load_arrays(START + b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R.")


def test_encoding_one_string_many_times_takes_its_memory_once():
    data = b"c_codecs\nencode\nq\x00X\x03\x00\x00\x00abcq\x01X\x06\x00\x00\x00latin1\x86q\x02R"
    first, *others = load_arrays(START + b"](" + data + b"h\x00h\x02R" * 5 + b"e.")
    assert first == b"abc" and all(other is first for other in others)


def test_a_truncated_pickle_is_an_error_at_every_length():
    data = pickle.dumps({"x": np.arange(20), "plain": PLAIN}, 4)
    for length in range(len(data)):
        with pytest.raises(UserError) as caught:
            load_arrays(data[:length])
        assert "\n" not in str(caught.value)


# pickletools decodes the argument of an old instruction before it can be refused.
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize("protocol", [2, 4])
def test_changed_bytes_give_data_or_an_error_but_nothing_else(protocol):
    source = pickle.dumps({"x": np.arange(20), "plain": PLAIN}, protocol)
    generator = random.Random(protocol)
    refused = 0
    for _ in range(3000):
        data = bytearray(source)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            load_arrays(bytes(data))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 1000


def test_random_instructions_raise_nothing_but_user_errors():
    generator = random.Random(0)
    opcodes = b"(.0NKX\x8c}])abeustlqrh\x85\x86\x87RbQcoi\x81\x82\x93\x94\x95UTGJM"
    for _ in range(3000):
        body = bytes(generator.choice(opcodes) for _ in range(generator.randint(1, 40)))
        with contextlib.suppress(UserError):
            load(START + body + b".", MAKES_NUMBER, persistent_load=lambda value: None)
