"""The file of an exported network, ``.bnn``: written, and read without trusting it.

The container is that of safetensors (https://github.com/huggingface/safetensors): a header in JSON and the bytes of
named arrays. Version 2 holds:

  metadata
    format       'bnn_jax.deploy'
    version      '2'
    facts        JSON: network, method, stage, run, commit, accuracy, class names, image size, normalisation
    checksums    JSON: CRC-32 of each array's bytes, and of ``facts``
  program        uint8: JSON, compressed by zlib (not so in version 1, which is read too): the operations of
                 ``graph.py`` and, for each layer, how its weights are stored
  constants      float32: all small numbers the program refers to, one behind another
  LAYER/weights  float32 kernels, or uint8: packed indices, see ``weights.py``
  LAYER/codebook uint8: patterns of nine bits, where not every pattern is in use

An array in the program is written {"at": first number in ``constants``, "size": numbers}; a single number as such.
"""

import dataclasses
import io
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnn_jax import run_files
from bnn_jax.array_files import BoundedFile, read_safetensors
from bnn_jax.deploy.graph import KINDS, Codes, Node, Program
from bnn_jax.deploy.weights import (
    POSITIONS,
    FloatWeights,
    LevelWeights,
    PatternWeights,
    Weights,
    pack_bits,
    pack_digits,
    packed_bytes,
    unpack_bits,
    unpack_digits,
)
from bnn_jax.errors import UserError

FORMAT, VERSION, READ_VERSIONS = "bnn_jax.deploy", "2", ("1", "2")
LARGEST_FILE = 2**31
MOST_WEIGHTS = 2**28

Array = np.ndarray


class ArtefactError(UserError):
    """A ``.bnn`` file that is missing, damaged, or of a version that is not known."""


@dataclasses.dataclass(frozen=True)
class Artefact:
    """An exported network.

    Attributes:
      program: its operations.
      weights: of each layer, by path.
      facts: plain values: 'network', 'method', 'stage', 'classes', 'image_shape', 'mean', 'std', 'accuracy', ...
      bytes_by_layer: stored bytes of each layer's weights, codebook included.
    """

    program: Program
    weights: Mapping[str, Weights]
    facts: Mapping[str, Any]
    bytes_by_layer: Mapping[str, int] = dataclasses.field(default_factory=dict)


def save(path: Path, program: Program, weights: Mapping[str, Weights], facts: Mapping[str, Any]) -> None:
    """Writes an artefact, in one step: the old file or the whole new one."""
    constants = _Constants()
    arrays: dict[str, Array] = {}
    layers = {name: _write_layer(name, layer, constants, arrays) for name, layer in weights.items()}
    nodes = [
        [node.kind, list(node.inputs), {name: _write_option(value, constants) for name, value in node.options.items()}]
        for node in program.nodes
    ]
    description = {"image_shape": program.image_shape, "nodes": nodes, "layers": layers}
    arrays["program"] = np.frombuffer(zlib.compress(_json(description).encode(), 9), np.uint8)
    arrays["constants"] = np.array(constants.numbers, np.float32)
    text = _json(facts)
    checksums = {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "facts": text,
        "checksums": _json({**checksums, "facts": zlib.crc32(text.encode())}),
    }
    temporary = path.with_name(f"{path.name}.tmp")
    # Only here: a program that classifies starts without it.
    import safetensors.numpy

    temporary.write_bytes(safetensors.numpy.save(arrays, metadata=metadata))
    temporary.replace(path)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, default=int)


class _Constants:
    """Collects small arrays, each once."""

    def __init__(self) -> None:
        self.numbers: list[float] = []
        self._places: dict[bytes, int] = {}

    def add(self, array: Any) -> Any:
        """A single number in place, the place of several."""
        array = np.asarray(array, np.float32)
        if array.ndim == 0:
            return float(array)
        key = array.tobytes()
        if key not in self._places:
            self._places[key] = len(self.numbers)
            self.numbers += array.tolist()
        return {"at": self._places[key], "size": array.size}


def _write_option(value: Any, constants: _Constants) -> Any:
    if isinstance(value, Codes):
        return [value.scale, value.low, value.high]
    return constants.add(value) if isinstance(value, np.ndarray | np.floating) else value


def _write_layer(name: str, layer: Weights, constants: _Constants, arrays: dict[str, Array]) -> dict[str, Any]:
    """Adds the arrays of a layer; returns how they are to be read."""
    stored = f"{name}/weights"
    if isinstance(layer, FloatWeights):
        arrays[stored] = np.ascontiguousarray(layer.kernel)
        return {"kind": "float", "shape": layer.shape}
    if isinstance(layer, PatternWeights):
        arrays[stored] = np.frombuffer(pack_bits(layer.indices, layer.bits), np.uint8)
        if not layer.all_patterns:
            arrays[f"{name}/codebook"] = np.frombuffer(pack_bits((layer.levels > 0).astype(np.uint16), 1), np.uint8)
        scale = constants.add(layer.scale)
        return {"kind": "patterns", "shape": layer.shape, "patterns": len(layer.levels), "scale": scale}
    packed = pack_bits(layer.indices, layer.bits) if layer.bits else pack_digits(layer.indices, len(layer.levels))
    arrays[stored] = np.frombuffer(packed, np.uint8)
    described = {"kind": "levels", "shape": layer.shape, "bits": layer.bits, "levels": constants.add(layer.levels)}
    return {**described, "scale": constants.add(layer.scale)}


def load(path: Path | str) -> Artefact:
    """Reads an artefact and checks everything in it.

    Raises:
      ArtefactError: the file is missing, damaged, of another version, or describes no network.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("no such file")
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{path.stat().st_size:,} bytes; accepted are {LARGEST_FILE:,}")
        return _read(path)
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ArtefactError(f"{path}: {message}"[:400]) from None


def _read(path: Path) -> Artefact:
    with BoundedFile(io.FileIO(path)) as file:
        metadata, arrays = read_safetensors(file)
    if metadata.get("format") != FORMAT:
        raise ValueError("no exported network")
    version = metadata.get("version")
    if version not in READ_VERSIONS:
        raise ValueError(f"version {version!r}; this program reads versions {', '.join(READ_VERSIONS)}")
    checksums, text = json.loads(metadata["checksums"]), metadata["facts"]
    if set(checksums) != {*arrays, "facts"}:
        raise ValueError("damaged: the sections are not those that were written")
    for name, found in {
        **{n: zlib.crc32(a.tobytes()) for n, a in arrays.items()},
        "facts": zlib.crc32(text.encode()),
    }.items():
        if checksums[name] != found:
            raise ValueError(f"damaged: section {name} has another checksum than when it was written")
    program = arrays["program"].tobytes()
    return _parse(run_files.parse(program if version == "1" else _decompressed(program)), arrays, json.loads(text))


def _decompressed(section: bytes) -> bytes:
    """Text that was compressed, as far as it is read at all: a few bytes can stand for gigabytes."""
    decompressor = zlib.decompressobj()
    try:
        text = decompressor.decompress(section, run_files.MOST_BYTES)
    except zlib.error:
        raise ValueError("section program: accepted is what zlib has compressed") from None
    if not decompressor.eof:
        raise ValueError(f"section program: accepted is a text of at most {run_files.MOST_BYTES} bytes")
    return text


def _parse(description: Any, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> Artefact:
    constants = arrays["constants"]
    if constants.dtype != np.float32 or constants.ndim != 1:
        raise ValueError("section constants: accepted are float32 numbers")
    layers = {name: _read_layer(name, layer, arrays, constants) for name, layer in description["layers"].items()}
    height, width, channels = _sizes(description["image_shape"], 3)
    nodes = tuple(_read_node(node, constants) for node in description["nodes"])
    program = Program(image_shape=(height, width, channels), nodes=nodes)
    shapes = program.shapes({name: layer.shape for name, layer in layers.items()})
    if not nodes or len(shapes[-1]) != 1:
        raise ValueError("its last operation gives no logits")
    _check_facts(facts, program.image_shape, shapes[-1][0])
    sections = {name: [arrays[f"{name}/weights"], arrays.get(f"{name}/codebook")] for name in layers}
    sizes = {name: sum(each.nbytes for each in found if each is not None) for name, found in sections.items()}
    return Artefact(program=program, weights=layers, facts=facts, bytes_by_layer=sizes)


def _check_facts(facts: Any, image_shape: tuple[int, ...], num_classes: int) -> None:
    if not isinstance(facts, dict):
        raise ValueError("facts: no table")
    for name, size in (("mean", image_shape[2]), ("std", image_shape[2])):
        values = facts.get(name, [0.0] * size)
        if len(values) != size or not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"facts: {name}={values!r}")
    classes = facts.get("classes", [])
    if len(classes) not in (0, num_classes) or not all(isinstance(each, str) for each in classes):
        raise ValueError(f"facts: names of {len(classes)} classes for {num_classes} outputs")


def _sizes(values: Any, count: int | None = None, least: int = 1) -> tuple[int, ...]:
    if not isinstance(values, list) or (count is not None and len(values) != count):
        raise ValueError(f"sizes {values!r}")
    if not all(type(value) is int and least <= value < 2**31 for value in values):
        raise ValueError(f"sizes {values!r}")
    return tuple(values)


def _floats(value: Any, constants: Array) -> Any:
    if isinstance(value, dict):
        (at, size) = _sizes([value["at"], value["size"]], least=0)
        if at + size > len(constants):
            raise ValueError(f"constants {at} to {at + size} of {len(constants)}")
        return constants[at : at + size]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"number {value!r}")
    return np.float32(value)


def _codes(value: Any) -> Codes:
    scale, low, high = value
    if not (isinstance(scale, int | float) and 0 < scale < math.inf and -256 <= low <= high <= 256):
        raise ValueError(f"codes {value!r}")
    return Codes(float(scale), int(low), int(high))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"name {value!r}")
    return value


_PARSERS: dict[str, Any] = {
    "text": lambda value, _: _text(value),
    "size": lambda value, _: _sizes([value])[0],
    "sizes": lambda value, _: _sizes(value),
    "counts": lambda value, _: _sizes(value, least=0),
    "pairs": lambda value, _: tuple(_sizes(pair, 2, least=0) for pair in value),
    "floats": _floats,
    "codes": lambda value, _: _codes(value),
}


def _read_node(node: Any, constants: Array) -> Node:
    kind, inputs, options = node
    if kind not in KINDS or not set(options) <= set(KINDS[kind].options):
        raise ValueError(f"operation {kind!r} with {', '.join(options)}")
    parsed = {name: _PARSERS[KINDS[kind].options[name]](value, constants) for name, value in options.items()}
    return Node(kind, _sizes(inputs, least=0), parsed)


def _read_layer(name: str, layer: Any, arrays: Mapping[str, Array], constants: Array) -> Weights:
    shape, stored = _sizes(layer["shape"]), arrays[f"{name}/weights"]
    count = math.prod(shape)
    if len(shape) not in (2, 4) or count > MOST_WEIGHTS:
        raise ValueError(f"layer {name}: shape {shape}")
    if layer["kind"] == "float":
        if stored.dtype != np.float32 or stored.shape != shape:
            raise ValueError(f"layer {name}: section of shape {stored.shape}, expected {shape}")
        return FloatWeights(stored)
    scale = _floats(layer["scale"], constants)
    if np.shape(scale) not in ((), shape[-1:]):
        raise ValueError(f"layer {name}: {np.size(scale)} scales")
    if layer["kind"] == "patterns":
        return _read_patterns(name, layer, arrays, scale)
    levels, bits = np.atleast_1d(_floats(layer["levels"], constants)), layer["bits"]
    if not 1 <= len(levels) <= 2**16 or type(bits) is not int or not 0 <= bits <= 16 or (not bits and len(levels) < 3):
        raise ValueError(f"layer {name}: {len(levels)} levels at {bits!r} bits")
    if stored.dtype != np.uint8 or stored.nbytes != packed_bytes(count, bits, len(levels)):
        raise ValueError(f"layer {name}: {stored.nbytes} bytes of weights")
    found = unpack_bits(stored, bits, count) if bits else unpack_digits(stored, len(levels), count)
    if found.max(initial=0) >= len(levels):
        raise ValueError(f"layer {name}: an index beyond its {len(levels)} levels")
    return LevelWeights(found.reshape(shape), levels, np.asarray(scale), bits)


def _read_patterns(name: str, layer: Any, arrays: Mapping[str, Array], scale: Any) -> PatternWeights:
    shape, count = _sizes(layer["shape"], 4), _sizes([layer["patterns"]])[0]
    if shape[:2] != (3, 3) or count > 2**POSITIONS:
        raise ValueError(f"layer {name}: {count} patterns for kernels {shape}")
    codebook = arrays.get(f"{name}/codebook")
    if codebook is None:
        numbers = np.arange(2**POSITIONS)[:, None] >> np.arange(POSITIONS - 1, -1, -1)
        signs, count = numbers & 1, 2**POSITIONS
    else:
        if codebook.dtype != np.uint8 or codebook.nbytes != packed_bytes(count * POSITIONS, 1, 2):
            raise ValueError(f"layer {name}: {codebook.nbytes} bytes of patterns")
        signs = unpack_bits(codebook, 1, count * POSITIONS).reshape(count, POSITIONS).astype(np.int16)
    levels, stored = (2 * signs - 1).astype(np.float32), arrays[f"{name}/weights"]
    bits = max(1, math.ceil(math.log2(count)))
    if stored.dtype != np.uint8 or stored.nbytes != packed_bytes(shape[2] * shape[3], bits, count):
        raise ValueError(f"layer {name}: {stored.nbytes} bytes of weights")
    indices = unpack_bits(stored, bits, shape[2] * shape[3]).reshape(shape[2:])
    if indices.max(initial=0) >= count:
        raise ValueError(f"layer {name}: an index beyond its {count} patterns")
    return PatternWeights(indices, levels, np.asarray(scale), all_patterns=codebook is None)
