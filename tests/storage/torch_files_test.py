"""Files of any format that cost more than they weigh are refused in two seconds and 4 times their size + 64 MiB;
real ones load.
"""

import json
import pathlib
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.storage.torch_writer import Opcodes, assemble, save, storage, tensor, torchvision_state, write

SECONDS = 2.0
# Reads each file with as much address space as a reader may take, and tells what came of it.
PROGRAM = """
import json, os, pathlib, resource, sys, time
sys.path.insert(0, sys.argv[1])
from bnn_jax.errors import UserError
from bnn_jax import run_files
from bnn_jax.deploy import artefact
from bnn_jax.storage import other_files
for path in map(pathlib.Path, sys.argv[2:]):
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * path.stat().st_size + (64 << 20), resource.RLIM_INFINITY))
    begin, error, arrays = time.process_time(), None, None
    try:
        if path.suffix == ".json":
            run_files.read(path, run_files.TRAINED)
        elif path.suffix == ".bnn":
            artefact.load(path)
        else:
            state = other_files.read_arrays(path)
            # What an import holds at last: a copy of each array.
            arrays = len([array.copy() for array in state.values()])
            del state
    except UserError as caught:
        error = str(caught)
    seconds = time.process_time() - begin
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps({"error": error, "arrays": arrays, "seconds": seconds}), flush=True)
"""


def understated(path: pathlib.Path) -> pathlib.Path:
    """A storage that declares 100 bytes and inflates to 1 GiB."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    # Behind a full flush the same mebibyte is packed into the same bytes again.
    packed = (pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)) * (1 << 10) + pack.flush()
    write(path, {"x": tensor(storage(elements=25), size=(25,), stride=(1,))}, {"0": packed})
    data = bytearray(path.read_bytes())
    # The local header is passed over; the table of contents says how the record is packed, and how large it is.
    entry = data.rindex(b"archive/data/0") - 46
    struct.pack_into("<H", data, entry + 10, zipfile.ZIP_DEFLATED)
    struct.pack_into("<I", data, entry + 24, 100)
    path.write_bytes(data)
    return path


def with_pickle(path: pathlib.Path, *parts: bytes) -> pathlib.Path:
    """A file whose pickle is put together from instructions; a storage of six floats is at hand."""
    return write(path, Opcodes(b"".join(parts)), {"0": bytes(24)})


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def colliding_keys(path: pathlib.Path) -> pathlib.Path:
    numbers = (k * (2**61 - 1) for k in range(1, 60_001))
    return with_pickle(path, b"}(", *(b"\x8a\x0a" + n.to_bytes(10, "little") + b"N" for n in numbers), b"u")


def colliding_tuples(path: pathlib.Path) -> pathlib.Path:
    return with_pickle(path, b"}(", *(b"J" + struct.pack("<i", n) + b"K\x01\x86N" for n in range(60_000)), b"u")


def many_views(path: pathlib.Path) -> pathlib.Path:
    """Each view takes three instructions: its arguments, remembered, the function, the call."""
    function, arguments = b"ctorch._utils\n_rebuild_tensor_v2\nq\x01", assemble(tensor().arguments) + b"q\x02"
    return with_pickle(path, b"](", function, arguments, b"R", b"h\x01h\x02R" * 660_000, b"e")


def large_views(path: pathlib.Path) -> pathlib.Path:
    """4,000 views of one tensor of 4 MiB, each of which an import would copy."""
    view = tensor(storage(elements=1 << 20), size=(1 << 20,), stride=(1,))
    first = text("a0") + assemble(view.function) + b"q\x01" + assemble(view.arguments) + b"q\x02R"
    rest = (text(f"a{n}") + b"h\x01h\x02R" for n in range(1, 4_000))
    return write(path, Opcodes(b"".join((b"}(", first, *rest, b"u"))), {"0": bytes(4 << 20)})


def many_names(path: pathlib.Path) -> pathlib.Path:
    first = text("a") + assemble(tensor()) + b"q\x01"
    return with_pickle(path, b"}(", first, *(text(f"n{n}.weight") + b"h\x01" for n in range(600_000)), b"u")


def names_of_one_tensor(path: pathlib.Path) -> pathlib.Path:
    first = text("a") + assemble(tensor()) + b"q\x01"
    return with_pickle(path, b"}(", first, *(text(f"n{n}.weight") + b"h\x01" for n in range(60_000)), b"u")


def long_names(path: pathlib.Path) -> pathlib.Path:
    """As many and as long names as are accepted; the arrays are read."""
    first = text("a.weight") + assemble(tensor()) + b"q\x01"
    return with_pickle(path, b"}(", first, *(text(f"n{n}." + "layer1." * 69) + b"h\x01" for n in range(4_900)), b"u")


def one_long_name(path: pathlib.Path) -> pathlib.Path:
    return with_pickle(path, b"}", text("a" * (27 << 20)), assemble(tensor()), b"s")


def long_key(path: pathlib.Path) -> pathlib.Path:
    return with_pickle(path, b"}", text("layer1." * 400_000), assemble(tensor()), b"s")


def many_records(path: pathlib.Path) -> pathlib.Path:
    """A table of contents of 80,000 empty records, and nothing else."""
    names = [f"a/data/{number:07}".encode() for number in range(80_000)]
    row = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, *(0,) * 7, len(names[0]), *(0,) * 6)
    table = b"".join(row + name for name in names)
    path.write_bytes(table + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 3, 3, len(table), 0, 0))
    return path


def with_header(path: pathlib.Path, header: bytes, data: bytes = b"") -> pathlib.Path:
    """A file of safetensors."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def endless_header(path: pathlib.Path) -> pathlib.Path:
    path.write_bytes((1 << 39).to_bytes(8, "little") + b"{" + b" " * 100)
    return path


def many_arrays(path: pathlib.Path) -> pathlib.Path:
    """30,000 arrays over the same byte."""
    entry = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    return with_header(path, b"{" + b",".join(b'"n%d":%s' % (n, entry) for n in range(30_000)) + b"}", b"0")


def inflating_npz(path: pathlib.Path) -> pathlib.Path:
    """20 arrays of 50 MiB of zeros, in 1 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"n{number}.npy", bytes(50 << 20))
    return path


def nested_npy(path: pathlib.Path) -> pathlib.Path:
    """An array whose header, which numpy reads as Python's, is nested without end."""
    header = b"\x93NUMPY\x02\x00" + (1 << 20).to_bytes(4, "little") + b"(" * (1 << 20)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header)
    return path


def json_of(text: bytes) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(path: pathlib.Path) -> pathlib.Path:
        path = path.with_suffix(".json")
        path.write_bytes(text)
        return path

    return make


def exported_with(header: bytes) -> Callable[[pathlib.Path], pathlib.Path]:
    return lambda path: with_header(path.with_suffix(".bnn"), header)


CASES = {
    "safetensors: a header of 512 GiB": (endless_header, "its header is longer than the file"),
    "safetensors: a header of 60 MB": (
        lambda path: with_header(path, b"{" + b" " * 60_000_000),
        "a header of 60000001",
    ),
    "safetensors: 700,000 lists": (lambda path: with_header(path, b'{"a":[' + b"[]," * 690_000 + b"[]]}"), "JSON"),
    "safetensors: nested": (lambda path: with_header(path, b'{"a":' * 300_000 + b"1" + b"}" * 300_000), "JSON"),
    "safetensors: 30,000 arrays": (many_arrays, "30000 arrays; accepted are at most 5000"),
    "npz: 1 GB of zeros": (inflating_npz, "many times its size"),
    "npz: a nested header": (nested_npy, "no header of an array"),
    "exported: 700,000 lists": (exported_with(b'{"a":[' + b"[]," * 690_000 + b"[]]}"), "JSON"),
    "exported: a header of 60 MB": (exported_with(b"{" + b" " * 60_000_000), "a header of 60000001"),
    "run: 1.3 million lists": (json_of(b"[" + b"[]," * 1_300_000 + b"[]]"), "JSON of at most"),
    "run: 30 million numbers": (json_of(b"[" + b"0.1," * 30_000_000 + b"1]"), "JSON of at most"),
    "run: a million numbers": (json_of(b"[" + b"0.1," * 1_000_000 + b"1]"), "accepted is an object"),
    "run: nested": (json_of(b"[" * 300_000 + b"]" * 300_000), "accepted is JSON"),
    "an entry that inflates to 1 GiB": (understated, "wrong checksum or header"),
    "60,000 colliding integer keys": (colliding_keys, "an integer of 10 bytes"),
    "60,000 tuples as keys": (colliding_tuples, "a key of type tuple"),
    "660,000 views of one tensor": (many_views, "more than 5000 tensors"),
    "4,000 views of a large tensor": (large_views, "many times the size of the file"),
    "600,000 names": (many_names, "accepted are at most 4194304"),
    "60,000 names of one tensor": (names_of_one_tensor, "60001 arrays; accepted are at most 5000"),
    "one name of 27 MiB": (one_long_name, "accepted are at most 4194304"),
    "one name of 2.8 MB": (long_key, "a key of 2800000 characters"),
    "names as long as may be": (long_names, None),
    "100,000 nested lists": (lambda path: with_pickle(path, b"]" * 100_000, b"a" * 99_999), "holds a list"),
    "100,000 nested tuples": (lambda path: with_pickle(path, b")" + b"\x85" * 100_000), "holds a tuple"),
    "80,000 nested dictionaries": (
        lambda path: with_pickle(path, b"}" + b"K\x00}" * 80_000, b"s" * 80_000),
        "no state of a network",
    ),
    "4 million lists": (lambda path: with_pickle(path, b"]" * 4_000_000), "more than 250000 instructions"),
    "240,000 remembered": (lambda path: with_pickle(path, b"}" + b"\x94" * 240_000), "no state of a network"),
    "80,000 records": (many_records, "larger than that of any checkpoint"),
}


@pytest.mark.slow
def test_files_that_cost_more_than_they_weigh_are_refused_and_a_resnet50_loads(tmp_path):
    paths = [make(tmp_path / f"{number}.pth") for number, (make, _) in enumerate(CASES.values())]
    # The names and numbers of axes of torchvision's file, of half the width: 25 MB.
    state = torchvision_state((3, 4, 6, 3), bottleneck=True, widths=(32, 64, 128, 256))
    paths.append(save(tmp_path / "resnet50.pth", {name: np.ascontiguousarray(array) for name, array in state.items()}))
    assert paths[-1].stat().st_size > 25e6
    command = [sys.executable, "-c", PROGRAM, str(ROOT), *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *results, resnet50 = map(json.loads, run.stdout.splitlines())
    for (name, (_, reason)), result in zip(CASES.items(), results, strict=True):
        assert result["seconds"] < SECONDS, (name, result)
        if reason is None:
            assert result["error"] is None, (name, result)
        else:
            assert result["error"] is not None, name
            assert reason in result["error"], (name, result)
            assert "\n" not in result["error"], name
    assert resnet50["error"] is None and resnet50["arrays"] == 267
