"""From a traced program to operations: rules for the primitives of jax that networks consist of."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bnn_jax.deploy.graph import Node

# Rows of the traced batch. Every value has the batch in front; it is left out of shapes.
BATCH = 2

# The primitive that stands for a call of a layer; its parameter ``path`` names it.
LAYER = "bnn_layer"


def module_scope(path: str) -> str:
    """Name of the scope in which a module computes."""
    return f"bnn:{path}:"


def _module_of(equation: Any) -> str:
    """Path of the module that an equation is a part of, if it is in its scope."""
    return next(iter(reversed(re.findall(r"bnn:([^:]*):", str(equation.source_info.name_stack)))), "")


def _inner(equation: Any) -> Any:
    """The program of a nested call, or None."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if inner is not None:
            return inner
    return None


def needed(jaxpr: Any) -> set[Any]:
    """Variables of a program that its outputs depend on."""
    needed = {variable for variable in jaxpr.outvars if not hasattr(variable, "val")}
    for equation in reversed(jaxpr.eqns):
        if any(variable in needed for variable in equation.outvars):
            needed.update(variable for variable in equation.invars if not hasattr(variable, "val"))
    return needed


class Reader:
    """Turns equations into nodes; a value is an array where it is known already, else the number of the node."""

    def __init__(self, layer: Callable[[str], Node]):
        self.nodes: list[Node] = []
        self._layer = layer
        self._module = ""

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
        inner, around = _inner(equation), self._module
        self._module = _module_of(equation) or around
        try:
            if inner is None:
                return self._operation(equation, inputs)
            jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            return self.read(jaxpr, consts, dict(zip(jaxpr.invars, inputs, strict=True)), needed(jaxpr))
        finally:
            self._module = around

    def _operation(self, equation: Any, inputs: list[Any]) -> list[Any]:
        if not any(isinstance(each, int) for each in inputs):
            results = equation.primitive.bind(*inputs, **equation.params)
            return [np.asarray(each) for each in (results if equation.primitive.multiple_results else [results])]
        if equation.primitive.name == LAYER:
            node = self._layer(equation.params["path"])
            return self.emit(node.kind, *inputs, **node.options)
        name, shapes = equation.primitive.name, [variable.aval.shape for variable in equation.invars]
        return _RULES.get(name, _unknown)(self, inputs, equation.params, shapes, equation)

    def emit(self, kind: str, *inputs: int, **options: Any) -> list[Any]:
        """Adds a node; its value is the result."""
        self.nodes.append(Node(kind, inputs, options, self._module))
        return [len(self.nodes)]


def _unknown(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    raise ValueError(f"export: the network uses the operation {equation.primitive.name!r}, which files do not have")


def _per_channel(constant: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A constant operand as () or (C,)."""
    full = np.broadcast_to(np.asarray(constant, np.float32), shape)
    row = full[(0,) * (full.ndim - 1)]
    if not np.array_equal(full, np.broadcast_to(row, shape)):
        raise ValueError(f"export: a constant of shape {np.shape(constant)} that differs between positions")
    return row[0].copy() if np.all(row == row[0]) else row.copy()


def _sum_or_difference(sign: int) -> Callable:
    def rule(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
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


def _product(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    a, b = inputs
    if isinstance(a, int) and isinstance(b, int):
        return reader.emit("multiply", a, b)
    value, constant = (a, b) if isinstance(a, int) else (b, a)
    return reader.emit("affine", value, scale=_per_channel(constant, equation.outvars[0].aval.shape))


def _quotient(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    if not isinstance(inputs[0], int) or isinstance(inputs[1], int):
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("divide", inputs[0], by=_per_channel(inputs[1], shapes[0]))


def _bound(name: str) -> Callable:
    def rule(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
        value, constant = inputs if isinstance(inputs[0], int) else inputs[::-1]
        if isinstance(constant, int):
            return _unknown(reader, inputs, params, shapes, equation)
        return reader.emit("clip", value, **{name: _per_channel(constant, equation.outvars[0].aval.shape)})

    return rule


def _clamp(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    low, value, high = inputs
    shape = shapes[1]
    return reader.emit("clip", value, low=_per_channel(low, shape), high=_per_channel(high, shape))


def _round(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    kinds = {jax.lax.RoundingMethod.TO_NEAREST_EVEN: "round", jax.lax.RoundingMethod.AWAY_FROM_ZERO: "round_away"}
    return reader.emit(kinds[params["rounding_method"]], inputs[0])


def _simple(kind: str) -> Callable:
    return lambda reader, inputs, params, shapes, equation: reader.emit(kind, *inputs)


def _same(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    return inputs[:1]


def _select(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    """``where(condition, on_true, on_false)``, kept for ``simplify``, which knows what it is a part of."""
    return reader.emit("select", *inputs)


def _greater(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    if not isinstance(inputs[0], int) or isinstance(inputs[1], int) or np.any(inputs[1] != 0):
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("is_positive", inputs[0])


def _reshape(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    old, new = shapes[0], equation.outvars[0].aval.shape
    if old[0] != new[0]:
        return _unknown(reader, inputs, params, shapes, equation)
    return inputs if old == new else reader.emit("reshape", inputs[0], shape=tuple(new[1:]))


def _broadcast(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    """Only new axes of length 1 behind the batch."""
    return _reshape(reader, inputs, params, shapes, equation)


def _transpose(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    axes = params["permutation"]
    if axes[0] != 0:
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("transpose", inputs[0], axes=tuple(axis - 1 for axis in axes[1:]))


def _pad(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    config = params["padding_config"]
    if isinstance(inputs[1], int) or np.any(inputs[1] != 0) or any(each[2] for each in config) or any(config[0]):
        return _unknown(reader, inputs, params, shapes, equation)
    low, high = (tuple(each[side] for each in config[1:]) for side in (0, 1))
    return reader.emit("pad", inputs[0], low=low, high=high) if any(low + high) else inputs[:1]


def _slice(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    start, stop = params["start_indices"], params["limit_indices"]
    step = params["strides"] or (1,) * len(start)
    if (start[0], stop[0], step[0]) != (0, BATCH, 1):
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("slice", inputs[0], start=tuple(start[1:]), stop=tuple(stop[1:]), step=tuple(step[1:]))


def _split(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    axis, shape, results, begin = params["axis"] - 1, shapes[0][1:], [], 0
    for size in params["sizes"]:
        start = tuple(begin if i == axis else 0 for i in range(len(shape)))
        stop = tuple(begin + size if i == axis else length for i, length in enumerate(shape))
        results += reader.emit("slice", inputs[0], start=start, stop=stop, step=(1,) * len(shape))
        begin += size
    return results


def _concatenate(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    if params["dimension"] != len(shapes[0]) - 1 or not all(isinstance(each, int) for each in inputs):
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("concatenate", *inputs)


def _window(kind: str) -> Callable:
    def rule(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
        window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
        if window[0] != 1 or window[-1] != 1 or len(window) != 4:
            return _unknown(reader, inputs, params, shapes, equation)
        options = {"window": window[1:3], "strides": strides[1:3], "padding": padding[1:3]}
        return reader.emit(kind, inputs[0], **{key: tuple(value) for key, value in options.items()})

    return rule


def _sum(reader: Reader, inputs: list[Any], params: Any, shapes: Any, equation: Any) -> Any:
    if tuple(params["axes"]) != (1, 2) or len(shapes[0]) != 4:
        return _unknown(reader, inputs, params, shapes, equation)
    return reader.emit("sum", inputs[0])


_RULES: dict[str, Callable] = {
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
