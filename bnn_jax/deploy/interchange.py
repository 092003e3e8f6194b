"""A program in formats that other runtimes read: ONNX with its plain operations, and StableHLO.

Weights are floats there: those runtimes have no products of packed signs. Both take normalised images (N, H, W, C), of
any number N, and give logits (N, K).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bnn_jax.deploy.graph import Node, Program
from bnn_jax.deploy.weights import Weights
from bnn_jax.errors import UserError

ONNX_OPSET = 17


def to_stablehlo(program: Program, weights: Mapping[str, Weights]) -> bytes:
    """The serialised form of ``jax.export``, for any batch size; ``jax.export.deserialize`` reads it."""
    import jax
    import jax.numpy as jnp

    from bnn_jax.deploy.jax_backend import function

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *program.image_shape), jnp.float32)
    exported = jax.export.export(jax.jit(function(program, weights)), platforms=("cpu", "cuda", "tpu"))
    return bytes(exported(images).serialize())


def to_onnx(program: Program, weights: Mapping[str, Weights]) -> bytes:
    """An ONNX model of the main opset.

    Raises:
      UserError: the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("--format=onnx needs the package onnx: pip install onnx") from None
    graph = _Graph(onnx, program, weights)
    values = {0: graph.add("Transpose", ["images"], perm=[0, 3, 1, 2])}
    for index, node in enumerate(program.nodes):
        inputs = [values[value] for value in node.inputs]
        values[index + 1] = graph.node(node, inputs, graph.shapes[node.inputs[0]])
    return graph.model(values[len(program.nodes)])


class _Graph:
    """Collects the nodes of an ONNX graph. Values with three axes lie as (N, C, H, W)."""

    def __init__(self, onnx: Any, program: Program, weights: Mapping[str, Weights]):
        self._onnx, self.weights, self._program = onnx, weights, program
        self.shapes = program.shapes({name: each.shape for name, each in weights.items()})
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def add(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Adds a node; returns the name of its output."""
        name = f"v{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, array: Any, dtype: type = np.float32) -> str:
        """Adds a constant; returns its name."""
        name = f"c{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def per_channel(self, value: Any, shape: tuple[int, ...]) -> str:
        """A number, or one for each channel of a value of that shape."""
        value = np.asarray(value, np.float32)
        return self.constant(value.reshape(-1, 1, 1) if value.ndim and len(shape) == 3 else value)

    def node(self, node: Node, inputs: list[str], shape: tuple[int, ...]) -> str:
        """Adds an operation whose first input has that shape; returns the name of its output."""
        return _RULES[node.kind](self, inputs, node.options, shape)

    def model(self, output: str) -> bytes:
        """The finished model."""
        helper, floats = self._onnx.helper, self._onnx.TensorProto.FLOAT
        self._nodes.append(helper.make_node("Identity", [output], ["logits"]))
        images = helper.make_tensor_value_info("images", floats, ["N", *self._program.image_shape])
        logits = helper.make_tensor_value_info("logits", floats, ["N", self.shapes[-1][0]])
        graph = helper.make_graph(self._nodes, "network", [images], [logits], self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=8)
        self._onnx.checker.check_model(model)
        return model.SerializeToString()


Rule = Callable[[_Graph, list[str], Mapping[str, Any], tuple[int, ...]], str]


def _pads(pairs: Any) -> list[int]:
    return [pair[side] for side in (0, 1) for pair in pairs]


def _product(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    """Small integers are multiplied as such and scaled afterwards, so that sums are exact as everywhere else."""
    value, codes = inputs[0], o.get("codes")
    layer = g.weights[o["layer"]]
    integers = layer.integers if codes is not None else None
    kernel, scale = (
        (layer.kernel, None) if codes is None or integers is None else (integers[0], integers[1] * codes.scale)
    )
    if scale is not None and codes.scale != 1:
        value = g.add("Round", [g.add("Div", [value, g.constant(codes.scale)])])
    kernel = np.asarray(kernel, np.float32)
    if kernel.ndim == 2:
        value = g.add("MatMul", [value, g.constant(kernel)])
    else:
        weights, options = (
            g.constant(kernel.transpose(3, 2, 0, 1)),
            {"strides": list(o["strides"]), "group": o["groups"]},
        )
        value = g.add("Conv", [value, weights], pads=_pads(o["padding"]), **options)
    return value if scale is None else g.add("Mul", [value, g.per_channel(scale, shape)])


def _affine(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    value = inputs[0]
    if "scale" in o:
        value = g.add("Mul", [value, g.per_channel(o["scale"], shape)])
    return g.add("Add", [value, g.per_channel(o["offset"], shape)]) if "offset" in o else value


def _clip(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    value = inputs[0]
    for name, kind in (("low", "Max"), ("high", "Min")):
        if name in o:
            value = g.add(kind, [value, g.per_channel(o[name], shape)])
    return value


def _round_away(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    raised = g.add("Add", [g.add("Abs", inputs), g.constant(0.5)])
    return g.add("Mul", [g.add("Sign", inputs), g.add("Floor", [raised])])


def _threshold(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    above = g.add("GreaterOrEqual", [inputs[0], g.per_channel(o["at"], shape)])
    below = g.add("LessOrEqual", [inputs[0], g.per_channel(o["below"], shape)])
    signs = g.add("Sub", [g.add("Cast", [each], to=1) for each in (above, below)])
    return g.add("Mul", [signs, g.per_channel(o["sign"], shape)]) if "sign" in o else signs


def _pool(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...], *, kind: str) -> str:
    window, strides = list(o["window"]), list(o["strides"])
    options: dict[str, Any] = {"kernel_shape": window, "strides": strides, "pads": _pads(o["padding"])}
    if kind == "MaxPool":
        return g.add(kind, inputs, **options)
    mean = g.add("AveragePool", inputs, **options, count_include_pad=1)
    return g.add("Mul", [mean, g.constant(float(np.prod(window)))])


def _reshape(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    value = g.add("Transpose", inputs, perm=[0, 2, 3, 1]) if len(shape) == 3 else inputs[0]
    value = g.add("Reshape", [value, g.constant([-1, *o["shape"]], np.int64)])
    return g.add("Transpose", [value], perm=[0, 3, 1, 2]) if len(o["shape"]) == 3 else value


def _transpose(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    if len(shape) != 3:
        return inputs[0]
    # Axes of (N, C, H, W) in the place of those of (N, H, W, C).
    ours = g.add("Transpose", inputs, perm=[0, 2, 3, 1])
    moved = g.add("Transpose", [ours], perm=[0, *(axis + 1 for axis in o["axes"])])
    return g.add("Transpose", [moved], perm=[0, 3, 1, 2])


def _channels_first(values: Any) -> list[int]:
    values = list(values)
    return [values[-1], *values[:-1]]


def _pad(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    pads = [0, *_channels_first(o["low"]), 0, *_channels_first(o["high"])]
    return g.add("Pad", [*inputs, g.constant(pads, np.int64)])


def _slice(g: _Graph, inputs: list[str], o: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    parts = [g.constant(_channels_first(o[name]), np.int64) for name in ("start", "stop")]
    axes = g.constant(range(1, len(shape) + 1), np.int64)
    return g.add("Slice", [*inputs, *parts, axes, g.constant(_channels_first(o["step"]), np.int64)])


def _plain(kind: str) -> Rule:
    return lambda g, inputs, options, shape: g.add(kind, inputs)


_RULES: dict[str, Rule] = {
    "conv": _product,
    "dense": _product,
    "affine": _affine,
    "divide": lambda g, inputs, o, shape: g.add("Div", [*inputs, g.per_channel(o["by"], shape)]),
    "add": _plain("Add"),
    "multiply": _plain("Mul"),
    "clip": _clip,
    "prelu": lambda g, inputs, o, shape: g.add("PRelu", [*inputs, g.per_channel(o["slope"], shape)]),
    "round": _plain("Round"),
    "round_away": _round_away,
    "floor": _plain("Floor"),
    "sign": _plain("Sign"),
    "abs": _plain("Abs"),
    "threshold": _threshold,
    "max_pool": lambda g, inputs, o, shape: _pool(g, inputs, o, shape, kind="MaxPool"),
    "sum_pool": lambda g, inputs, o, shape: _pool(g, inputs, o, shape, kind="AveragePool"),
    "sum": lambda g, inputs, o, shape: g.add("ReduceSum", [*inputs, g.constant([2, 3], np.int64)], keepdims=0),
    "reshape": _reshape,
    "transpose": _transpose,
    "pad": _pad,
    "slice": _slice,
    "concatenate": lambda g, inputs, o, shape: g.add("Concat", inputs, axis=1),
}
