"""Memory of values and weights in the order in which the compiled kernels read them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bnn_jax.deploy.fuse import product_of
from bnn_jax.deploy.graph import Codes, Node, Program
from bnn_jax.deploy.layouts import (
    aligned,
    codebook_offsets,
    codebook_rows,
    depthwise_weights,
    float_weights,
    integer_weights,
    nibble_weights,
    round_up,
    word_weights,
)
from bnn_jax.deploy.native import CODEBOOK_TILE, CTensor, Kernels
from bnn_jax.deploy.weights import PatternWeights, Weights

Array = np.ndarray

# The format in which each kind of product reads its input; elements of a pixel are those of that format.
FORMATS = {
    "float": "float",
    "depthwise": "float",
    "binary": "signs",
    "codebook": "planes",
    "bytes": "bytes",
    "shorts": "shorts",
}
DTYPES = {"float": np.float32, "planes": np.int8, "bytes": np.uint8, "shorts": np.int16}
# The byte that stands for four zeros, see kernels.c.
FOUR_ZEROS = 80


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a value lies in memory.

    Attributes:
      format: 'float', 'signs', 'planes', 'bytes' or 'shorts'.
      shape: (H, W, C).
      padding: rows and columns around it: (top, bottom, left, right).
      codes: of 'bytes' and 'shorts'.
      exact: whether pixels follow each other without gaps, as in images.
    """

    format: str
    shape: tuple[int, int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    codes: Codes | None = None
    exact: bool = False


class Buffer:
    """Memory of one value."""

    def __init__(self, layout: Layout, batch: int, kernels: Kernels):
        self.layout = layout
        height, width, channels = layout.shape
        top, bottom, left, right = layout.padding
        self.elements = _elements(layout, kernels)
        if layout.format == "planes":
            # A column of zeros between rows and a row between images serve both sides.
            row, image = width + 1, (width + 1) * (height + 1)
            self.plane = round_up(batch * image + 2 * row + 2 * CODEBOOK_TILE, 64)
            memory = aligned(np.zeros(channels * self.plane + 64, np.int8))
            self._set(memory, row + 1, image, row, 1)
            return
        row, rows = (left + width + right) * self.elements, top + height + bottom
        dtype = (
            (np.uint8 if kernels.reads_nibbles else np.uint64) if layout.format == "signs" else DTYPES[layout.format]
        )
        zero = FOUR_ZEROS if layout.format == "signs" and kernels.reads_nibbles else 0
        zero = -layout.codes.low if layout.format == "bytes" and layout.codes is not None else zero
        # Kernels read up to two positions beyond the last.
        slack = 16 * self.elements + 64
        memory = aligned(np.full(batch * rows * row + slack, zero, dtype))
        self._set(memory, top * row + left * self.elements, rows * row, row, self.elements)
        self.plane = 0

    def _set(self, memory: Array, origin: int, image: int, row: int, pixel: int) -> None:
        self.memory = memory
        self.tensor = CTensor(memory.ctypes.data + origin * memory.itemsize, image, row, pixel)
        self._origin = origin

    def view(self, batch: int) -> Array:
        """The values as an array (N, H, W, C) of float32, without what lies between them."""
        tensor, size = self.tensor, self.memory.itemsize
        strides = (tensor.image * size, tensor.row * size, tensor.pixel * size, size)
        shape = (batch, *self.layout.shape)
        return np.lib.stride_tricks.as_strided(self.memory[self._origin :], shape, strides)


def _elements(layout: Layout, kernels: Kernels) -> int:
    """Elements of the format in one pixel."""
    channels = layout.shape[2]
    match layout.format:
        case "float":
            return channels if layout.exact else round_up(channels, 16)
        case "signs":
            return -(-channels // 4) if kernels.reads_nibbles else 2 * -(-channels // 64)
        case "bytes":
            return round_up(channels, 4)
        case "shorts":
            return round_up(channels, 2)
    return channels


class Layers:
    """The weights of a network in the order the kernels read them; shared by all plans."""

    def __init__(self, program: Program, weights: Mapping[str, Weights], kernels: Kernels):
        self.weights, self.kernels = weights, kernels
        self.products = {
            index: product_of(node, weights[node.options["layer"]], instruction_set=kernels.name)
            for index, node in enumerate(program.nodes)
            if node.kind in ("conv", "dense")
        }
        self._laid_out: dict[tuple[int, int], tuple[Array, Array | None]] = {}

    def laid_out(self, index: int, node: Node, elements: int) -> tuple[Array, Array | None]:
        """Weights of a layer and, of a codebook, the rows of its patterns."""
        key = (index, elements)
        if key not in self._laid_out:
            weights, rows = self._lay_out(self.products[index], node, elements)
            self._laid_out[key] = aligned(weights), rows
        return self._laid_out[key]

    def _lay_out(self, product: str, node: Node, elements: int) -> tuple[Array, Array | None]:
        layer, kernels = self.weights[node.options["layer"]], self.kernels
        if product == "codebook":
            assert isinstance(layer, PatternWeights)
            offsets = codebook_offsets(layer.indices, len(layer.levels), CODEBOOK_TILE)
            return offsets, codebook_rows(layer.levels)
        if product in ("float", "depthwise"):
            kernel = _four_axes(layer.kernel)
            if product == "depthwise":
                return depthwise_weights(kernel), None
            kernel = _ungrouped(kernel, node.options.get("groups", 1))
            return float_weights(kernel, kernels.float_tile, elements), None
        assert layer.integers is not None
        codes = _four_axes(layer.integers[0])
        if product == "binary":
            if kernels.reads_nibbles:
                return nibble_weights(codes > 0), None
            return word_weights(codes > 0, kernels.binary_tile), None
        return integer_weights(codes, kernels.integer_tile, np.int8 if product == "bytes" else np.int16), None

    def scale(self, index: int, node: Node) -> tuple[Any, Any] | None:
        """Factor and summand that turn a layer's sums of integers into its output; None where they are that already."""
        if self.products[index] in ("float", "depthwise"):
            return None
        layer, codes = self.weights[node.options["layer"]], node.options["codes"]
        assert layer.integers is not None
        integers, unit = layer.integers
        scale = unit * np.float32(codes.scale)
        if self.products[index] != "bytes" or codes.low == 0:
            return scale, np.float32(0)
        sums = integers.reshape(-1, integers.shape[-1]).sum(axis=0, dtype=np.int64)
        return scale, (codes.low * sums * scale).astype(np.float32)


def _four_axes(kernel: Array) -> Array:
    return kernel if kernel.ndim == 4 else kernel[None, None]


def _ungrouped(kernel: Array, groups: int) -> Array:
    """A kernel of several groups as one with zeros between them."""
    if groups == 1:
        return kernel
    height, width, num_in, num_out = kernel.shape
    whole = np.zeros((height, width, num_in * groups, num_out), kernel.dtype)
    each = num_out // groups
    for g in range(groups):
        whole[:, :, g * num_in : (g + 1) * num_in, g * each : (g + 1) * each] = kernel[..., g * each : (g + 1) * each]
    return whole
