"""From a Linen network and its variables to a list of operations and the weights of its layers.

The network is traced once. Calls of ``QuantConv`` and ``QuantDense`` become one opaque operation each, which carries
the layer's path; whatever else the network does is read from the traced program (``reader.py``). Nothing here knows a
network, a block or a quantizer by name.
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
from bnn_jax.deploy.reader import BATCH, LAYER, Reader, module_scope, needed
from bnn_jax.deploy.simplify import simplify
from bnn_jax.deploy.weights import FloatWeights, LevelWeights, PatternWeights, Weights
from bnn_jax.layers.conv import QuantConv, QuantDense
from bnn_jax.ops.codebook import all_patterns, codes
from bnn_jax.quantizers.base import ActQuantizer, QuantContext, WeightQuantizer, evaluation_context

# Parameters of modules that are one operation: BatchNorm, shifts, rectifiers.
NAMED = frozenset({"scale", "bias", "slope"})

_layer_call = jax.extend.core.Primitive(LAYER)
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
    reader = Reader(lambda path: _node_of(layers[path]))
    environment: dict[Any, Any] = {closed.jaxpr.invars[0]: 0}
    output = reader.read(closed.jaxpr, closed.consts, environment, needed(closed.jaxpr))[0]
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
            with jax.named_scope(module_scope(path)):
                return result + module.get_variable("params", "bias").reshape((1,) * (result.ndim - 1) + (-1,))
        if NAMED.isdisjoint(module.variables.get("params", {})):
            output = next_function(*args, **kwargs)
        else:
            with jax.named_scope(module_scope("/".join(module.path))):
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
    number_of_code = np.argsort(np.asarray(codes(jnp.asarray(every))))
    numbers = number_of_code[np.asarray(codes(jnp.asarray(levels)))].astype(np.uint16)
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


def _node_of(layer: _Layer) -> Node:
    """A call of a layer as an operation, still without its input."""
    module = layer.module
    options: dict[str, Any] = {"layer": "/".join(module.path)}
    if layer.codes is not None:
        options["codes"] = layer.codes
    if isinstance(module, QuantDense):
        return Node("dense", (), options)
    options.update(strides=tuple(module.strides), padding=tuple(map(tuple, module.padding)), groups=module.groups)
    return Node("conv", (), options)
