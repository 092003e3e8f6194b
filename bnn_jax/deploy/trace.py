"""From a Linen network and its variables to a list of operations and the weights of its layers.

The network is traced once. Calls of ``QuantConv`` and ``QuantDense`` become one opaque operation each, which carries
the layer's path; whatever else the network does is read from the traced program: operations on constants are computed, the
others are a handful of kinds. Nothing here knows a network, a block or a quantizer by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from bnn_jax.deploy.fold import fold_thresholds
from bnn_jax.deploy.graph import Codes, Node, Program
from bnn_jax.deploy.simplify import simplify
from bnn_jax.deploy.weights import FloatWeights, LevelWeights, PatternWeights, Weights
from bnn_jax.layers.conv import QuantConv, QuantDense
from bnn_jax.ops.codebook import all_patterns, codes
from bnn_jax.quantizers.base import ActQuantizer, QuantContext, WeightQuantizer, evaluation_context

# Rows of the traced batch. Every value has the batch in front; it is left out of shapes.
BATCH = 2

_layer_call = jax.extend.core.Primitive("bnn_layer")
_layer_call.def_abstract_eval(lambda x, *, path, shape: jax.core.ShapedArray(shape, x.dtype))


@dataclasses.dataclass
class _Layer:
    """What is known of a layer: the module, its weights, the codes of its input."""

    module: Any
    weights: Weights | None = None
    codes: Codes | None = None
    input: Any = None


def trace(
    network: nn.Module,
    variables: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    context: QuantContext | None = None,
) -> tuple[Program, dict[str, Weights]]:
    """The evaluation of a network as operations.

    Args:
      network: (images, QuantContext) -> NetworkOutput.
      variables: its variables.
      image_shape: (H, W, C).
      context: context of the evaluation; None: that of the variables, without a choice of branches.

    Returns:
      The program, whose output are the logits, and the weights of each layer by path.

    Raises:
      ValueError: the network does something that no operation of the format means.
    """
    layers: dict[str, _Layer] = {}
    context = evaluation_context(variables) if context is None else context
    images = jax.ShapeDtypeStruct((BATCH, *image_shape), jnp.float32)
    with nn.intercept_methods(_interceptor(layers)):
        closed = jax.make_jaxpr(lambda images: network.apply(variables, images, context).logits)(images)
    reader = _Reader(layers)
    environment: dict[Any, Any] = {closed.jaxpr.invars[0]: 0}
    output = reader.read(closed.jaxpr, closed.consts, environment, _needed(closed.jaxpr))[0]
    nodes = simplify(reader.nodes, output)
    used = {node.options["layer"] for node in nodes if "layer" in node.options}
    weights = {path: layer.weights for path, layer in layers.items() if path in used and layer.weights is not None}
    return fold_thresholds(Program(image_shape=image_shape, nodes=tuple(nodes)), weights), weights


def _interceptor(layers: dict[str, _Layer]) -> Callable:
    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return next_function(*args, **kwargs)
        if isinstance(module, (QuantConv, QuantDense)):
            path = "/".join(module.path)
            if path in layers:
                raise ValueError(f"layer {path} is called twice")
            layer = layers[path] = _Layer(module)
            output = next_function(*args, **kwargs)
            assert layer.input is not None  # its activation quantizer was called
            result = _layer_call.bind(layer.input, path=path, shape=output.shape)
            if not module.use_bias:
                return result
            return result + module.get_variable("params", "bias").reshape((1,) * (result.ndim - 1) + (-1,))
        output = next_function(*args, **kwargs)
        owner = layers.get("/".join(module.path[:-1])) if isinstance(module.parent, (QuantConv, QuantDense)) else None
        if owner is not None and isinstance(module, ActQuantizer):
            owner.input, owner.codes = output, _codes_of(module, args[1])
        elif owner is not None and isinstance(module, WeightQuantizer):
            with jax.ensure_compile_time_eval():
                owner.weights = _weights_of(module, args, lambda: next_function(*args, **kwargs))
        return output

    return interceptor


def _codes_of(quantizer: Any, context: QuantContext) -> Codes | None:
    with jax.ensure_compile_time_eval():
        scale, levels = quantizer.code_scale(context), quantizer.levels(context)
        if scale is None or levels is None or np.size(scale) != 1 or float(scale) <= 0:
            return None
        whole = np.asarray(levels, np.float64) / float(scale)
    low, high = int(np.rint(whole.min())), int(np.rint(whole.max()))
    fits = np.allclose(whole, np.rint(whole), atol=1e-4) and low >= -256 and high <= 256
    return Codes(scale=float(scale), low=low, high=high) if fits else None


def _weights_of(quantizer: Any, arguments: tuple, forward: Callable[[], Any]) -> Weights:
    encoded = quantizer.encode(*arguments)
    if encoded is None:
        return FloatWeights(np.asarray(forward(), np.float32))
    indices, levels = np.asarray(encoded.indices).astype(np.uint16), np.asarray(encoded.levels, np.float32)
    scale = np.asarray(encoded.scale, np.float32)
    scale = scale.reshape(-1) if scale.size > 1 else scale.reshape(())
    if levels.ndim == 2:
        return _pattern_weights(indices, levels, scale)
    return _level_weights(indices, levels, scale, quantizer.cost(indices.shape).stored_bits)


def _pattern_weights(indices: np.ndarray, levels: np.ndarray, scale: np.ndarray) -> PatternWeights:
    every = np.asarray(all_patterns())
    if len(levels) < len(every):
        return PatternWeights(indices, levels, scale, all_patterns=False)
    # With all patterns nothing has to be stored of the codebook but its order, and any order will do.
    number_of_code = np.argsort(np.asarray(codes(every)))
    numbers = number_of_code[np.asarray(codes(levels))].astype(np.uint16)
    return PatternWeights(numbers[indices], every, scale, all_patterns=True)


def _level_weights(indices: np.ndarray, levels: np.ndarray, scale: np.ndarray, stored_bits: float) -> LevelWeights:
    """With the fewest bits of an index, but never fewer than the network's description says."""
    bits = int(stored_bits) if stored_bits == int(stored_bits) else 0
    zero = int(np.argmin(np.abs(levels)))
    if bits and len(levels) == 2**bits + 1 and levels[zero] == 0:
        # A level for weights that are exactly 0: there are none, or they are whole filters, whose scale can be 0.
        zeros = indices == zero
        filters = zeros.reshape(-1, zeros.shape[-1]).all(axis=0)
        if np.array_equal(zeros, np.broadcast_to(filters, zeros.shape)):
            indices, levels = np.where(zeros, 0, indices - (indices > zero)), np.delete(levels, zero)
            scale = np.where(filters, np.float32(0), scale) if filters.any() else scale
    if bits and len(levels) > 2**bits:
        bits = int(len(levels) - 1).bit_length()
    return LevelWeights(indices.astype(np.uint16), levels, scale, bits)


def _inner(equation: Any) -> Any:
    """The program of a nested call, or None."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if inner is not None:
            return inner
    return None


def _needed(jaxpr: Any) -> set[Any]:
    """Variables of a program that its outputs depend on."""
    needed = {variable for variable in jaxpr.outvars if not hasattr(variable, "val")}
    for equation in reversed(jaxpr.eqns):
        if any(variable in needed for variable in equation.outvars):
            needed.update(variable for variable in equation.invars if not hasattr(variable, "val"))
    return needed


class _Reader:
    """Turns equations into nodes; a value is an array where it is known already, else the number of the node."""

    def __init__(self, layers: Mapping[str, _Layer]):
        self.layers, self.nodes = layers, []

    def read(self, jaxpr: Any, consts: Any, environment: dict[Any, Any], needed: set[Any]) -> list[Any]:
        """The outputs of a program whose inputs are in the environment."""
        environment.update(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))

        def value(variable: Any) -> Any:
            return np.asarray(variable.val) if hasattr(variable, "val") else environment[variable]

        for equation in jaxpr.eqns:
            if any(variable in needed for variable in equation.outvars):
                results = self.equation(equation, [value(variable) for variable in equation.invars])
                environment.update(zip(equation.outvars, results, strict=True))
        return [value(variable) for variable in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[Any]) -> list[Any]:
        """The results of one equation."""
        inner = _inner(equation)
        if inner is not None:
            jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            return self.read(jaxpr, consts, dict(zip(jaxpr.invars, inputs, strict=True)), _needed(jaxpr))
        if not any(isinstance(each, int) for each in inputs):
            results = equation.primitive.bind(*inputs, **equation.params)
            return [np.asarray(each) for each in (results if equation.primitive.multiple_results else [results])]
        name, shapes = equation.primitive.name, [variable.aval.shape for variable in equation.invars]
        return _RULES.get(name, _unknown)(self, inputs, equation.params, shapes, equation)

    def emit(self, kind: str, *inputs: int, **options: Any) -> list[Any]:
        """Adds a node; its value is the result."""
        self.nodes.append(Node(kind, inputs, options))
        return [len(self.nodes)]


def _unknown(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    raise ValueError(f"export: the network uses the operation {equation.primitive.name!r}, which files do not have")


def _per_channel(constant: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A constant operand as () or (C,)."""
    full = np.broadcast_to(np.asarray(constant, np.float32), shape)
    row = full[(0,) * (full.ndim - 1)]
    if not np.array_equal(full, np.broadcast_to(row, shape)):
        raise ValueError(f"export: a constant of shape {np.shape(constant)} that differs between positions")
    return row[0].copy() if np.all(row == row[0]) else row.copy()


def _sum_or_difference(sign: int) -> Callable:
    def rule(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
        a, b = inputs
        if isinstance(a, int) and isinstance(b, int):
            b = b if sign > 0 else reader.emit("affine", b, scale=np.float32(-1))[0]
            return reader.emit("add", a, b)
        shape = equation.outvars[0].aval.shape
        if isinstance(a, int):
            return reader.emit("affine", a, offset=sign * _per_channel(b, shape))
        scale = {"scale": np.float32(-1)} if sign < 0 else {}
        return reader.emit("affine", b, offset=_per_channel(a, shape), **scale)

    return rule


def _product(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    a, b = inputs
    if isinstance(a, int) and isinstance(b, int):
        return reader.emit("multiply", a, b)
    value, constant = (a, b) if isinstance(a, int) else (b, a)
    return reader.emit("affine", value, scale=_per_channel(constant, equation.outvars[0].aval.shape))


def _quotient(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    if not isinstance(inputs[0], int) or isinstance(inputs[1], int):
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("divide", inputs[0], by=_per_channel(inputs[1], shapes[0]))


def _bound(name: str) -> Callable:
    def rule(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
        value, constant = inputs if isinstance(inputs[0], int) else inputs[::-1]
        if isinstance(constant, int):
            return _unknown(reader, inputs, params, shapes, equation)
        return reader.emit("clip", value, **{name: _per_channel(constant, equation.outvars[0].aval.shape)})

    return rule


def _clamp(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    low, value, high = inputs
    shape = shapes[1]
    return reader.emit("clip", value, low=_per_channel(low, shape), high=_per_channel(high, shape))


def _round(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    kinds = {jax.lax.RoundingMethod.TO_NEAREST_EVEN: "round", jax.lax.RoundingMethod.AWAY_FROM_ZERO: "round_away"}
    return reader.emit(kinds[params["rounding_method"]], inputs[0])


def _simple(kind: str) -> Callable:
    return lambda reader, inputs, params, shapes, equation: reader.emit(kind, *inputs)


def _same(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    return inputs[:1]


def _select(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    """``where(condition, on_true, on_false)``, kept for ``simplify``, which knows what it is a part of."""
    return reader.emit("select", *inputs)


def _greater(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    if not isinstance(inputs[0], int) or isinstance(inputs[1], int) or np.any(inputs[1] != 0):
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("is_positive", inputs[0])


def _reshape(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    old, new = shapes[0], equation.outvars[0].aval.shape
    if old[0] != new[0]:
        return _unknown(reader, inputs, params, shapes, equation)
    return inputs if old == new else reader.emit("reshape", inputs[0], shape=tuple(new[1:]))


def _broadcast(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    """Only new axes of length 1 behind the batch."""
    return _reshape(reader, inputs, params, shapes, equation)


def _transpose(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    axes = params["permutation"]
    if axes[0] != 0:
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("transpose", inputs[0], axes=tuple(axis - 1 for axis in axes[1:]))


def _pad(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    config = params["padding_config"]
    if isinstance(inputs[1], int) or np.any(inputs[1] != 0) or any(each[2] for each in config) or any(config[0]):
        return _unknown(reader, inputs, params, shapes, equation)
    low, high = (tuple(each[side] for each in config[1:]) for side in (0, 1))
    return reader.emit("pad", inputs[0], low=low, high=high) if any(low + high) else inputs[:1]


def _slice(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    start, stop = params["start_indices"], params["limit_indices"]
    step = params["strides"] or (1,) * len(start)
    if (start[0], stop[0], step[0]) != (0, BATCH, 1):
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("slice", inputs[0], start=tuple(start[1:]), stop=tuple(stop[1:]), step=tuple(step[1:]))


def _split(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    axis, shape, results, begin = params["axis"] - 1, shapes[0][1:], [], 0
    for size in params["sizes"]:
        start = tuple(begin if i == axis else 0 for i in range(len(shape)))
        stop = tuple(begin + size if i == axis else length for i, length in enumerate(shape))
        results += reader.emit("slice", inputs[0], start=start, stop=stop, step=(1,) * len(shape))
        begin += size
    return results


def _concatenate(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    if params["dimension"] != len(shapes[0]) - 1 or not all(isinstance(each, int) for each in inputs):
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("concatenate", *inputs)


def _window(kind: str) -> Callable:
    def rule(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
        window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
        if window[0] != 1 or window[-1] != 1 or len(window) != 4:
            return _unknown(reader, inputs, params, shapes, equation)
        options = {"window": window[1:3], "strides": strides[1:3], "padding": padding[1:3]}
        return reader.emit(kind, inputs[0], **{key: tuple(value) for key, value in options.items()})

    return rule


def _sum(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    if tuple(params["axes"]) != (1, 2) or len(shapes[0]) != 4:
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("sum", inputs[0])


def _layer(reader: _Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    layer = reader.layers[params["path"]]
    module, options = layer.module, {"layer": params["path"]}
    if layer.codes is not None:
        options["codes"] = layer.codes
    if isinstance(module, QuantDense):
        return reader.emit("dense", inputs[0], **options)
    options.update(strides=tuple(module.strides), padding=tuple(map(tuple, module.padding)), groups=module.groups)
    return reader.emit("conv", inputs[0], **options)


_RULES: dict[str, Callable] = {
    "bnn_layer": _layer,
    "add": _sum_or_difference(1),
    "add_any": _sum_or_difference(1),
    "sub": _sum_or_difference(-1),
    "mul": _product,
    "div": _quotient,
    "max": _bound("low"),
    "min": _bound("high"),
    "clamp": _clamp,
    "round": _round,
    "floor": _simple("floor"),
    "sign": _simple("sign"),
    "abs": _simple("abs"),
    "gt": _greater,
    "select_n": _select,
    "convert_element_type": _same,
    "stop_gradient": _same,
    "name": _same,
    "copy": _same,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "reduce_window_max": _window("max_pool"),
    "reduce_window_sum": _window("sum_pool"),
    "reduce_sum": _sum,
}
