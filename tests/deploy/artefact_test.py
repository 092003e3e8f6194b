"""The file: what comes back is what was written, and a file that was changed is refused in one line."""

import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnn_jax.deploy import artefact, load
from bnn_jax.deploy.artefact import ArtefactError
from bnn_jax.deploy.graph import Codes, Node, Program
from bnn_jax.deploy.weights import (
    FloatWeights,
    LevelWeights,
    PatternWeights,
    Weights,
    common_unit,
    pack_bits,
    pack_digits,
    packed_bytes,
    unpack_bits,
    unpack_digits,
)

FACTS = {"network": "tiny", "classes": ["cat", "dog", "cow"], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}


def network(seed: int = 0) -> tuple[Program, dict[str, Weights]]:
    """Every kind of weights and most kinds of operations."""
    random = np.random.default_rng(seed)
    scale = random.uniform(0.5, 1, 4).astype(np.float32)
    levels = np.array([-0.5, 0.25, 1], np.float32)
    signs = np.where(random.random((8, 9)) < 0.5, -1, 1).astype(np.float32)
    every = 2 * (np.arange(512)[:, None] >> np.arange(8, -1, -1) & 1) - 1
    weights: dict[str, Weights] = {
        "a": FloatWeights(random.normal(size=(3, 3, 3, 4)).astype(np.float32)),
        "b": LevelWeights(random.integers(0, 2, (3, 3, 4, 4)).astype(np.uint16), np.float32([-1, 1]), scale, 1),
        "c": PatternWeights(random.integers(0, 8, (4, 4)).astype(np.uint16), signs, scale, all_patterns=False),
        "d": PatternWeights(
            random.integers(0, 512, (4, 4)).astype(np.uint16), every.astype(np.float32), scale, all_patterns=True
        ),
        "e": LevelWeights(random.integers(0, 3, (4, 3)).astype(np.uint16), levels, np.float32(2), 0),
    }
    options = {"strides": (1, 1), "padding": ((1, 1), (1, 1)), "groups": 1}
    signs_of = {**options, "codes": Codes(1.0, -1, 1)}
    nodes = [
        Node("conv", (0,), {"layer": "a", **options}),
        Node("affine", (1,), {"scale": scale, "offset": np.float32(0.5)}),
        Node("sign", (2,)),
        Node("conv", (3,), {"layer": "b", **signs_of}),
        Node("add", (4, 2)),
        Node("clip", (5,), {"low": np.float32(-1), "high": np.float32(1)}),
        Node("sign", (6,)),
        Node("conv", (7,), {"layer": "c", **signs_of}),
        Node("threshold", (8,), {"at": scale, "below": -scale}),
        Node("conv", (9,), {"layer": "d", **signs_of}),
        Node("max_pool", (10,), {"window": (2, 2), "strides": (2, 2), "padding": ((0, 0), (0, 0))}),
        Node("sum", (11,)),
        Node("dense", (12,), {"layer": "e"}),
    ]
    return Program((6, 6, 3), tuple(nodes)), weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    artefact.save(tmp_path / "x.bnn", *network(), FACTS)
    return tmp_path / "x.bnn"


def test_what_is_read_is_what_was_written(path: Path) -> None:
    program, weights = network()
    found = artefact.load(path)
    assert found.facts == FACTS
    assert found.program.image_shape == program.image_shape
    for ours, theirs in zip(found.program.nodes, program.nodes, strict=True):
        assert (ours.kind, ours.inputs, set(ours.options)) == (theirs.kind, theirs.inputs, set(theirs.options))
        for name, value in theirs.options.items():
            if isinstance(value, np.ndarray | np.floating):
                np.testing.assert_array_equal(ours.options[name], value)
            else:
                assert ours.options[name] == value
    for name, layer in weights.items():
        np.testing.assert_array_equal(found.weights[name].kernel, layer.kernel)
        assert type(found.weights[name]) is type(layer)


def test_weights_take_the_bytes_of_their_bits(path: Path) -> None:
    sizes = artefact.load(path).bytes_by_layer
    assert sizes == {
        "a": 3 * 3 * 3 * 4 * 4,
        "b": 3 * 3 * 4 * 4 // 8,
        "c": 4 * 4 * 3 // 8 + 8 * 9 // 8,  # indices and codebook
        "d": 4 * 4 * 9 // 8,  # the index is the pattern
        "e": 8,  # twelve digits to base 3 in one word
    }


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 9, 16])
def test_packed_bits_come_back(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, 101).astype(np.uint16)
    data = pack_bits(values, bits)
    assert len(data) == packed_bytes(101, bits, 0) == -(-101 * bits // 8)
    np.testing.assert_array_equal(unpack_bits(data, bits, 101), values)


@pytest.mark.parametrize("base", [3, 5, 6, 7, 10, 200, 65535])
def test_packed_digits_come_back_and_waste_little(base: int) -> None:
    values = np.random.default_rng(0).integers(0, base, 4001).astype(np.uint16)
    values[:200] = base - 1
    data = pack_digits(values, base)
    assert len(data) == packed_bytes(4001, 0, base)
    np.testing.assert_array_equal(unpack_digits(data, base, 4001), values)
    if base < 11:
        assert 8 * len(data) < 1.05 * 4001 * np.log2(base)


@pytest.mark.parametrize(
    ("levels", "unit"),
    [
        ((-1, 1), 1),
        ((-1, 0, 1), 1),
        ((-1, -0.5, 0.5, 1), 0.5),
        ((-0.3, 0, 0.7), 0.1),
        ((0.25, 0.5, 2), 0.25),
        ((0.0,), 1),
        ((-1, 0.123456, np.pi), None),
    ],
)
def test_levels_that_are_multiples_of_a_number(levels: tuple[float, ...], unit: float | None) -> None:
    found = common_unit(np.float32(levels))
    assert (found is None) if unit is None else (found == pytest.approx(unit, rel=1e-6))


# ---- files that were not written like this ----


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """Changes metadata and arrays, and makes the checksums fit again, as an attacker would."""
    import safetensors.numpy

    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    arrays = safetensors.numpy.load(data)
    change(metadata, arrays)
    if "checksums" in metadata:
        sums = {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()}
        metadata["checksums"] = json.dumps({**sums, "facts": zlib.crc32(metadata.get("facts", "").encode())})
    path.write_bytes(safetensors.numpy.save(arrays, metadata=metadata))


def compressed(text: bytes) -> np.ndarray:
    return np.frombuffer(zlib.compress(text), np.uint8)


def in_program(edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(_: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        description = json.loads(zlib.decompress(arrays["program"].tobytes()))
        edit(description)
        arrays["program"] = compressed(json.dumps(description).encode())

    return change


def in_node(index: int, value: Any, place: int | str = 2) -> Callable:
    def edit(description: dict[str, Any]) -> None:
        node = description["nodes"][index]
        if isinstance(place, str):
            node[2][place] = value
        else:
            node[place] = value

    return in_program(edit)


HOSTILE: dict[str, tuple[Callable, str]] = {
    "another version": (lambda m, a: m.update(version="3"), "version '3'; this program reads versions 1, 2"),
    "another format": (lambda m, a: m.update(format="x"), "no exported network"),
    "no weights": (lambda m, a: a.__delitem__("b/weights"), "b/weights"),
    "weights cut": (lambda m, a: a.update({"b/weights": a["b/weights"][:-1]}), "layer b: 17 bytes of weights"),
    "floats as bytes": (lambda m, a: a.update({"a/weights": a["a/weights"].view(np.uint8)}), "layer a"),
    "constants cut": (lambda m, a: a.update({"constants": a["constants"][:3]}), "constants"),
    "unknown operation": (in_node(2, "exec", 0), "operation 'exec'"),
    "unknown option": (in_node(2, 1, "command"), "operation 'sign' with command"),
    "a value from later": (in_node(2, [9], 1), "operation 2 (sign): inputs (9,)"),
    "no input": (in_node(2, [], 1), "inputs"),
    "a layer that is not there": (in_node(0, "z", "layer"), "operation 0 (conv)"),
    "padding of a billion": (in_node(0, [[2**30, 2**30]] * 2, "padding"), "operation 0 (conv): result of shape"),
    "stride 0": (in_node(0, [0, 1], "strides"), "sizes [0, 1]"),
    "negative padding": (in_node(0, [[-1, 0], [0, 0]], "padding"), "sizes [-1, 0]"),
    "window larger than the image": (in_node(10, [200, 2], "window"), "operation 10 (max_pool): result of shape"),
    "codes of nothing": (in_node(3, [0.0, -1, 1], "codes"), "codes [0.0, -1, 1]"),
    "huge codes": (in_node(3, [1.0, -1, 10**9], "codes"), "codes"),
    "channels that do not fit": (in_node(1, {"at": 0, "size": 3}, "scale"), "operation 1 (affine)"),
    "text for a number": (in_node(1, "1", "offset"), "number '1'"),
    "groups": (in_node(3, 2, "groups"), "operation 3 (conv)"),
    "logits that are an image": (in_program(lambda d: d["nodes"].__delitem__(slice(11, None))), "gives no logits"),
    "no operations": (in_program(lambda d: d.update(nodes=[])), "gives no logits"),
    "too many patterns": (in_program(lambda d: d["layers"]["c"].update(patterns=10**6)), "layer c: 1000000 patterns"),
    "fewer patterns": (in_program(lambda d: d["layers"]["c"].update(patterns=7)), "layer c"),
    "bits of another kind": (in_program(lambda d: d["layers"]["b"].update(bits=3)), "layer b: 18 bytes of weights"),
    "a shape of five axes": (in_program(lambda d: d["layers"]["b"].update(shape=[1] * 5)), "layer b: shape"),
    "a huge shape": (in_program(lambda d: d["layers"]["b"].update(shape=[2**15] * 4)), "layer b: shape"),
    "other classes": (lambda m, a: m.update(facts=json.dumps({"classes": ["x"]})), "names of 1 classes for 3 outputs"),
    "other channels": (lambda m, a: m.update(facts=json.dumps({"mean": [0.0]})), "facts: mean=[0.0]"),
    "a program that is no JSON": (lambda m, a: a.update(program=compressed(b"{")), "accepted is JSON"),
    "nested without end": (lambda m, a: a.update(program=compressed(b"[" * 10**5)), "accepted is JSON"),
    "not compressed": (lambda m, a: a.update(program=np.frombuffer(b"{}", np.uint8)), "what zlib has compressed"),
    "compressed and cut": (lambda m, a: a.update(program=a["program"][:-9]), "a text of at most"),
    "gigabytes in a few bytes": (lambda m, a: a.update(program=compressed(bytes(2**26))), "a text of at most"),
    "arrays without program": (lambda m, a: a.__delitem__("program"), "program"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_describes_no_network_is_refused(name: str, path: Path) -> None:
    change, message = HOSTILE[name]
    rewrite(path, change)
    with pytest.raises(ArtefactError) as error:
        load(path)
    assert message in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_file_of_version_1_is_read(path: Path) -> None:
    classifier = load(path)
    images = np.ones((1, *classifier.image_shape), np.float32)
    expected = classifier.logits(images)

    def make_older(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        metadata["version"] = "1"
        arrays["program"] = np.frombuffer(zlib.decompress(arrays["program"].tobytes()), np.uint8)

    rewrite(path, make_older)
    np.testing.assert_array_equal(load(path).logits(images), expected)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"hello" * 100), ("zip", b"PK\x03\x04" + bytes(100))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtefactError, match=name):
            load(tmp_path / name)
    with pytest.raises(ArtefactError, match="no such file"):
        load(tmp_path / "absent.bnn")
    with pytest.raises(ArtefactError, match="no such file"):
        load(tmp_path)


def mutations(data: bytes, other: bytes, count: int) -> Any:
    """Truncated, changed in a few bits or bytes, spliced with another file, with a part repeated or large numbers."""
    random = np.random.default_rng(5)
    for number in range(count):
        changed = bytearray(data)
        at = int(random.integers(0, len(data)))
        match number % 6:
            case 0:
                changed = changed[:at]
            case 1:
                changed[at] ^= 1 << int(random.integers(0, 8))
            case 2:
                for place in random.integers(0, len(data), 8):
                    changed[place] = int(random.integers(0, 256))
            case 3:
                changed = changed[:at] + bytearray(other[at:])
            case 4:
                changed[at:at] = changed[max(0, at - 50) : at]
            case 5:
                changed[at : at + 8] = random.bytes(8)
        if bytes(changed) not in (data, other):
            yield bytes(changed)


def test_2000_changed_files_give_one_line_each_and_take_no_memory(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    artefact.save(tmp_path / "other.bnn", *network(1), FACTS)
    other, changed = (tmp_path / "other.bnn").read_bytes(), tmp_path / "changed.bnn"
    refused = 0
    tracemalloc.start()
    for mutation in mutations(data, other, 2300):
        changed.write_bytes(mutation)
        with pytest.raises(ArtefactError) as error:
            load(changed)
        refused += 1
        assert len(str(error.value)) <= 400 and "\n" not in str(error.value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused >= 2000
    # Ten times the file, and what errors and json need at all times.
    assert peak < 10 * len(data) + 2_000_000
