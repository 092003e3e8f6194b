"""Files that cost more than they weigh are refused in two seconds and 4 times their size + 64 MiB; real ones load."""

import json
import pathlib
import struct
import subprocess
import sys
import zipfile
import zlib

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
from bnn_jax.storage import pytorch
for path in map(pathlib.Path, sys.argv[2:]):
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * path.stat().st_size + (64 << 20), resource.RLIM_INFINITY))
    begin, error, arrays = time.process_time(), None, None
    try:
        state = pytorch.convert_names(pytorch.state_dict(pytorch.read_pytorch(path)))
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


CASES = {
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
