"""A network as a list of operations: what an exported file holds, what is run, and what each operation means.

Value 0 is the normalised image, value i + 1 the result of operation i. Shapes are without the batch, which is the first
axis of every value. The kinds of operations and their options are the table ``KINDS``, which defines the format:

  conv        layer, strides, padding, groups, codes     convolution (H, W, I) -> (H', W', O)
  dense       layer, codes                               (I,) -> (O,)
  affine      scale, offset                              x * scale + offset, numbers or (C,)
  divide      by                                         x / by
  add, multiply                                          of two values of one shape
  clip        low, high                                  either may be absent
  prelu       slope                                      x where x > 0, else slope * x
  round, round_away, floor, sign, abs                    ties to even; ties away from zero; ...
  threshold   at, below, sign                            +1 where x >= at, -1 where x <= below, else 0; times sign
  max_pool, sum_pool   window, strides, padding          padding counts as -infinity, as 0
  sum                                                    (H, W, C) -> (C,)
  reshape     shape
  transpose   axes                                       of the axes behind the batch
  pad         low, high                                  zeros, for each axis
  slice       start, stop, step                          for each axis
  concatenate                                            along the channels

``codes`` says that a layer's input takes the values ``scale * (low, low + 1, ..., high)`` only, so that it can be
multiplied as small integers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Array = Any

# The largest value of one image, in numbers, that is accepted from a file.
LARGEST_VALUE = 2**28


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
      kind: key of ``KINDS``.
      inputs: numbers of the values it reads.
      options: by name; float32 arrays of shape () or (C,), integers, tuples, text.
      module: path of the module that it is all of, as far as a trace knows; ``facts`` keep it for ``restart``.
    """

    kind: str
    inputs: tuple[int, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    module: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Codes:
    """Values that are small integers times a scale."""

    scale: float
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A network.

    Attributes:
      image_shape: (H, W, C).
      nodes: operations in an order in which they can be run; the last one gives the logits (K,).
    """

    image_shape: tuple[int, int, int]
    nodes: tuple[Node, ...]

    def shapes(self, kernels: Mapping[str, Shape]) -> list[Shape]:
        """Shape of every value.

        Args:
          kernels: shape of each layer's kernel, (kh, kw, I/groups, O) or (I, O).

        Raises:
          ValueError: operations that do not fit each other.
        """
        shapes: list[Shape] = [self.image_shape]
        for index, node in enumerate(self.nodes):
            kind = KINDS.get(node.kind)
            if kind is None:
                raise ValueError(f"operation {index}: kind {node.kind!r}")
            if len(node.inputs) < 1 or any(not 0 <= value <= index for value in node.inputs):
                raise ValueError(f"operation {index} ({node.kind}): inputs {node.inputs!r}")
            if kind.arity is not None and len(node.inputs) != kind.arity:
                raise ValueError(f"operation {index} ({node.kind}): {len(node.inputs)} inputs")
            try:
                shape = kind.shape([shapes[value] for value in node.inputs], node.options, kernels)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise ValueError(f"operation {index} ({node.kind}): {error}") from None
            if any(size < 1 for size in shape) or math.prod(shape) > LARGEST_VALUE:
                raise ValueError(f"operation {index} ({node.kind}): result of shape {shape}")
            shapes.append(shape)
        return shapes

    def consumers(self) -> list[list[int]]:
        """For each value the operations that read it."""
        found: list[list[int]] = [[] for _ in range(len(self.nodes) + 1)]
        for index, node in enumerate(self.nodes):
            for value in dict.fromkeys(node.inputs):
                found[value].append(index)
        return found


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a kind of operation means.

    Attributes:
      arity: number of inputs, or None for one or more.
      shape: (shapes of the inputs, options, shapes of kernels) -> shape of the result; raises where they do not fit.
      options: names of its options, and the parser of each from a file's value.
    """

    arity: int | None
    shape: Callable[[list[Shape], Mapping[str, Any], Mapping[str, Shape]], Shape]
    options: Mapping[str, str]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def window_output(size: int, window: int, stride: int, padding: tuple[int, int]) -> int:
    """Positions of a window along one axis."""
    return (size + padding[0] + padding[1] - window) // stride + 1


def _conv_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    (height, width, channels), kernel = inputs[0], kernels[options["layer"]]
    _require(len(kernel) == 4, "kernel of a convolution")
    groups = options["groups"]
    _require(channels == kernel[2] * groups and kernel[3] % groups == 0, f"{channels} channels, kernel {kernel}")
    spatial = zip((height, width), kernel[:2], options["strides"], options["padding"], strict=True)
    return (*(window_output(*each) for each in spatial), kernel[3])


def _dense_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    kernel = kernels[options["layer"]]
    _require(len(kernel) == 2 and inputs[0] == (kernel[0],), f"input {inputs[0]}, kernel {kernel}")
    return (kernel[1],)


def _elementwise_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    _require(all(shape == inputs[0] for shape in inputs), f"inputs {inputs}")
    for name, value in options.items():
        _require(np.shape(value) in ((), inputs[0][-1:]), f"{name} for {inputs[0]}")
    return inputs[0]


def _pool_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    height, width, channels = inputs[0]
    _require(all(before < size for (before, _), size in zip(options["padding"], options["window"], strict=True)), "pad")
    spatial = zip((height, width), options["window"], options["strides"], options["padding"], strict=True)
    return (*(window_output(*each) for each in spatial), channels)


def _sum_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    return (inputs[0][2],)


def _reshape_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    _require(math.prod(options["shape"]) == math.prod(inputs[0]), f"{inputs[0]} as {options['shape']}")
    return tuple(options["shape"])


def _transpose_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    _require(sorted(options["axes"]) == list(range(len(inputs[0]))), f"axes {options['axes']}")
    return tuple(inputs[0][axis] for axis in options["axes"])


def _pad_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    return tuple(a + b + c for a, b, c in zip(inputs[0], options["low"], options["high"], strict=True))


def _slice_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    rows = list(zip(inputs[0], options["start"], options["stop"], options["step"], strict=True))
    _require(all(start < stop <= size and step > 0 for size, start, stop, step in rows), f"slice of {inputs[0]}")
    return tuple(-(-(stop - start) // step) for _, start, stop, step in rows)


def _concatenate_shape(inputs: list[Shape], options: Mapping[str, Any], kernels: Mapping[str, Shape]) -> Shape:
    _require(all(shape[:-1] == inputs[0][:-1] for shape in inputs), f"inputs {inputs}")
    return (*inputs[0][:-1], sum(shape[-1] for shape in inputs))


_POOL = {"window": "sizes", "strides": "sizes", "padding": "pairs"}
_SAME = _elementwise_shape

KINDS: dict[str, Kind] = {
    "conv": Kind(
        1,
        _conv_shape,
        {"layer": "text", "strides": "sizes", "padding": "pairs", "groups": "size", "codes": "codes"},
    ),
    "dense": Kind(1, _dense_shape, {"layer": "text", "codes": "codes"}),
    "affine": Kind(1, _SAME, {"scale": "floats", "offset": "floats"}),
    "divide": Kind(1, _SAME, {"by": "floats"}),
    "add": Kind(2, _SAME, {}),
    "multiply": Kind(2, _SAME, {}),
    "clip": Kind(1, _SAME, {"low": "floats", "high": "floats"}),
    "prelu": Kind(1, _SAME, {"slope": "floats"}),
    **{name: Kind(1, _SAME, {}) for name in ("round", "round_away", "floor", "sign", "abs")},
    "threshold": Kind(1, _SAME, {"at": "floats", "below": "floats", "sign": "floats"}),
    "max_pool": Kind(1, _pool_shape, _POOL),
    "sum_pool": Kind(1, _pool_shape, _POOL),
    "sum": Kind(1, _sum_shape, {}),
    "reshape": Kind(1, _reshape_shape, {"shape": "sizes"}),
    "transpose": Kind(1, _transpose_shape, {"axes": "counts"}),
    "pad": Kind(1, _pad_shape, {"low": "counts", "high": "counts"}),
    "slice": Kind(1, _slice_shape, {"start": "counts", "stop": "sizes", "step": "sizes"}),
    "concatenate": Kind(None, _concatenate_shape, {}),
}


def compute(
    xp: Any, node: Node, inputs: list[Array], convolve: Callable[[Array, Node], Array], pool: Callable
) -> Array:
    """The result of an operation on arrays with a batch axis.

    Args:
      xp: numpy or jax.numpy.
      node: the operation.
      inputs: its inputs (N, ...).
      convolve: (input, node) -> output of 'conv' and 'dense'.
      pool: (input, node) -> output of the poolings.
    """
    x, options = inputs[0], node.options
    match node.kind:
        case "conv" | "dense":
            return convolve(x, node)
        case "max_pool" | "sum_pool":
            return pool(x, node)
        case "affine":
            x = x * options["scale"] if "scale" in options else x
            return x + options["offset"] if "offset" in options else x
        case "divide":
            return x / options["by"]
        case "add":
            return x + inputs[1]
        case "multiply":
            return x * inputs[1]
        case "clip":
            return xp.clip(x, options.get("low"), options.get("high"))
        case "prelu":
            return xp.where(x > 0, x, x * options["slope"])
        case "round_away":
            return xp.sign(x) * xp.floor(xp.abs(x) + np.float32(0.5))
        case "round" | "floor" | "sign" | "abs":
            return getattr(xp, node.kind)(x)
        case "threshold":
            signs = (x >= options["at"]).astype(np.float32) - (x <= options["below"]).astype(np.float32)
            return signs * options["sign"] if "sign" in options else signs
        case _:
            return _move(xp, node, inputs)


def _move(xp: Any, node: Node, inputs: list[Array]) -> Array:
    """Operations that move values about, and the sum over all positions."""
    x, options = inputs[0], node.options
    match node.kind:
        case "sum":
            return xp.sum(x, axis=(1, 2))
        case "reshape":
            return x.reshape(x.shape[0], *options["shape"])
        case "transpose":
            return xp.transpose(x, (0, *(axis + 1 for axis in options["axes"])))
        case "pad":
            return xp.pad(x, ((0, 0), *zip(options["low"], options["high"], strict=True)))
        case "slice":
            bounds = zip(options["start"], options["stop"], options["step"], strict=True)
            return x[(slice(None), *(slice(*each) for each in bounds))]
        case "concatenate":
            return xp.concatenate(inputs, axis=-1)
    raise ValueError(f"operation {node.kind!r}")
