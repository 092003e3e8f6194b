"""What a network costs, layer by layer: parameters, stored bits, multiply-accumulates, bit operations.

Definitions, the same for every network and method:

- weights: entries of the kernels of convolutions and dense layers; a layer is quantized if its weight quantizer stores
  fewer than 32 bits per weight. Every other layer, and why it is not quantized, is listed too.
- parameters: trainable numbers, those of quantizers (a codebook) included.
- quantized bits: stored bits per weight times weights, over the quantized layers, rounded to a whole bit per layer; of
  weights that are look-ups, the indices only. A pruning mask does not reduce them: masked weights take a level like any
  other (``levels_in_use`` counts them).
- codebook bits: the layers' own tables that weights are looked up in, one bit for each entry of a binary pattern. A
  table with all patterns is not stored, the index is the pattern.
- full-precision bits: 32 times every other stored float: kernels of the layers that are not quantized, biases,
  parameters of quantizers, scale, bias, running mean and running variance of BatchNorm, and the scales that follow from
  the latent weights (one a layer for DoReFa, one a filter for IR-Net and codebooks). Masks are not counted.
- stored bits: the sum of the three.
- MACs: multiply-accumulates of convolutions and dense layers for one image; positions in the zero padding count.
- shared MACs: the same with the work that a method's weights let filters share. Where the ``n`` patterns of a codebook
  are fewer than the O filters, every input channel meets each pattern once and each filter adds up what it is made of:
  ``I * (9 n + O / 2)`` for each output position instead of ``9 I O``, an addition without product counting half.
- bit operations: weight bits times activation bits times shared MACs, over the quantized layers only, rounded to a
  whole one per layer. The weight bits are those of the value that is multiplied: 1 for a binary pattern, whose stored
  bits per weight are fewer.
- activation bits: those of the values a layer really multiplies, see ``activation_bits_of_layers``.

Every figure of a method comes from its weight quantizer's ``cost``.

Reference: the sizes and costs published with SNN (arXiv 2110.09195; release: yikaiw/SNN: README) are the quantized bits
and the bit operations; the formula of the sharing was inferred from them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bnn_jax.layers.conv import QuantConv, QuantDense
from bnn_jax.quantizers.base import ActQuantizer, Encoded, QuantContext, WeightQuantizer
from bnn_jax.storage.weights import encoded_weights

FLOAT_BITS = 32

# Operations on one array that move its values or choose among them, so that the result takes no other value.
VALUE_PRESERVING = (
    "broadcast_in_dim",
    "copy",
    "reduce_max",
    "reduce_window_max",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "tile",
    "transpose",
)


@dataclasses.dataclass(frozen=True)
class LayerComplexity:
    """Cost of one layer; the module's docstring defines each figure.

    Attributes:
      path: names of the modules around it, joined by '/'.
      kind: 'conv', 'dense', 'batch_norm', or the class name of another module with parameters of its own.
      kernel_shape: (kh, kw, I/groups, O), (I, O), or None where there is no kernel.
      output_shape: shape of the output without the batch axis.
      parameters: trainable numbers.
      weights: entries of the kernel.
      weight_bits: stored bits per weight; 32 where there is no kernel.
      operation_bits: bits of a weight as it is multiplied; 32 where there is no kernel.
      activation_bits: bits of the values the kernel is multiplied with; 32 where there is no kernel.
      macs: multiply-accumulates for one image.
      shared_macs: the same with work that filters share.
      quantized: whether the weights are.
      full_precision_because: why it is not, or ''.
      quantized_bits: stored bits of quantized weights.
      codebook_bits: stored bits of codebooks.
      full_precision_bits: stored bits of floats.
    """

    path: str
    kind: str
    kernel_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...]
    parameters: int
    weights: int
    weight_bits: float
    operation_bits: float
    activation_bits: float
    macs: int
    shared_macs: float
    quantized: bool
    full_precision_because: str
    quantized_bits: int
    codebook_bits: int
    full_precision_bits: int

    @property
    def stored_bits(self) -> int:
        """All stored bits of the layer."""
        return self.quantized_bits + self.codebook_bits + self.full_precision_bits

    @property
    def bit_operations(self) -> int:
        """Multiplied bits times activation bits times shared MACs; 0 unless the weights are quantized."""
        return round(self.operation_bits * self.activation_bits * self.shared_macs) if self.quantized else 0


@dataclasses.dataclass(frozen=True)
class TotalComplexity:
    """Sums over the layers; the module's docstring defines each figure."""

    parameters: int
    quantized_bits: int
    codebook_bits: int
    full_precision_bits: int
    stored_bits: int
    macs: int
    bit_operations: int


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Cost of a network.

    Attributes:
      layers: every module with parameters of its own, in the order the network calls them.
      title: of the table.
    """

    layers: tuple[LayerComplexity, ...]
    title: str = "Complexity"

    @property
    def total(self) -> TotalComplexity:
        """Sums over the layers."""
        names = [field.name for field in dataclasses.fields(TotalComplexity)]
        return TotalComplexity(**{name: sum(getattr(layer, name) for layer in self.layers) for name in names})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: {'layers': [...], 'total': {...}}."""
        sums = ("stored_bits", "bit_operations")
        layers = [
            {**dataclasses.asdict(layer), **{name: getattr(layer, name) for name in sums}} for layer in self.layers
        ]
        return {"layers": layers, "total": dataclasses.asdict(self.total)}


@dataclasses.dataclass
class _Noted:
    """What is noted of a module: shapes and output positions of its calls, and how many numbers are stored for it."""

    module: Any
    kernel_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] = ()
    positions: int = 0
    latent: int = 0
    codebook: int = 0
    other_parameters: int = 0
    statistics: int = 0

    @property
    def kind(self) -> str:
        """What the module is: whatever keeps running statistics is a BatchNorm, with branches or without."""
        for known, name in ((QuantConv, "conv"), (QuantDense, "dense")):
            if isinstance(self.module, known):
                return name
        return "batch_norm" if self.statistics else type(self.module).__name__


def complexity(network: nn.Module, image_shape: tuple[int, int, int]) -> Complexity:
    """Cost of a network for images of one size; nothing is computed, the network is only traced.

    Args:
      network: (images, QuantContext) -> NetworkOutput.
      image_shape: (H, W, C).
    """
    noted: dict[str, _Noted] = {}
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with _noting_calls(noted):
        jaxpr, variables = jax.make_jaxpr(
            lambda key, images: network.init(key, images, QuantContext(train=False)), return_shape=True
        )(jax.random.key(0), images)
    _add_sizes(variables, noted)
    bits = activation_bits_of_layers(jaxpr)
    with_kernel = [path for path, module in noted.items() if module.kernel_shape is not None]
    return Complexity(
        layers=tuple(
            _layer(path, module, bits.get(path, float(FLOAT_BITS)), with_kernel)
            for path, module in noted.items()
            if module.latent + module.other_parameters + module.statistics
        )
    )


@contextlib.contextmanager
def _noting_calls(noted: dict[str, _Noted]) -> Iterator[None]:
    """Notes every module called inside, and marks quantized values and inputs of layers in the traced program."""

    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return next_function(*args, **kwargs)
        module, path = context.module, "/".join(context.module.path)
        if not isinstance(module, (ActQuantizer, WeightQuantizer)):
            # Noted before the call, so that the order is that of the calls and not that of the returns.
            noted.setdefault(path, _Noted(module))
        output = next_function(*args, **kwargs)
        if isinstance(module, ActQuantizer):
            return _marked(output, module)
        if path in noted and isinstance(output, jax.Array):
            _note(noted[path], args[0].shape, output.shape)
        return output

    with nn.intercept_methods(interceptor):
        yield


def _marked(output: jax.Array, quantizer: ActQuantizer) -> jax.Array:
    """The quantizer's output, named after its bits and, inside a layer, after the layer that reads it."""
    if quantizer.bits < FLOAT_BITS:
        output = checkpoint_name(output, f"bits:{quantizer.bits}")
    if isinstance(quantizer.parent, (QuantConv, QuantDense)):
        output = checkpoint_name(output, "read by:" + "/".join(quantizer.parent.path))
    return output


def _note(noted: _Noted, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> None:
    """Adds shapes and output positions of one call; a module called twice costs twice the MACs."""
    module, noted.output_shape = noted.module, output_shape[1:]
    if isinstance(module, QuantConv):
        noted.kernel_shape = (*module.kernel_size, input_shape[-1] // module.groups, module.features)
    elif isinstance(module, QuantDense):
        noted.kernel_shape = (input_shape[-1], module.features)
    noted.positions += math.prod(noted.output_shape[:-1])


def activation_bits_of_layers(jaxpr: Any) -> dict[str, float]:
    """Bits of the values each layer multiplies its kernel with.

    The marks of ``_marked`` are followed through the traced program: values of an activation quantizer have its bits,
    and keep them through operations that only move values or choose among them (reshaping, max pooling, ...); whatever
    else computes on them makes them 32-bit again. So a layer behind a BatchNorm behind a quantizer reads 32 bits: it
    takes 2**bits values per channel, but on a grid of its own in every channel, which no product of integers can use.
    The zeros of the padding are not counted as a further value.

    Args:
      jaxpr: closed jaxpr of the network with the marks.

    Returns:
      Bits by path of the layer.
    """
    found: dict[str, float] = {}
    _follow_bits(jaxpr.jaxpr, [float(FLOAT_BITS)] * len(jaxpr.jaxpr.invars), found)
    return found


def _follow_bits(jaxpr: Any, input_bits: list[float], found: dict[str, float]) -> list[float]:
    """Bits of the outputs of a jaxpr, given those of its inputs; fills ``found`` on the way."""
    bits_of = dict(zip(jaxpr.invars, input_bits, strict=True))

    def read(variable: Any) -> float:
        return float(FLOAT_BITS) if hasattr(variable, "val") else bits_of.get(variable, float(FLOAT_BITS))

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        results = [float(FLOAT_BITS)] * len(equation.outvars)
        inner = _inner_jaxpr(equation)
        if equation.primitive.name == "name":
            kind, _, text = equation.params["name"].partition(":")
            if kind == "read by":
                found[text] = max(operands[0], found.get(text, 0.0))
            results = [float(text) if kind == "bits" else operands[0]]
        elif inner is not None:
            results = _follow_bits(inner, operands, found)
        elif equation.primitive.name in VALUE_PRESERVING:
            results = [operands[0]]
        bits_of.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _inner_jaxpr(equation: Any) -> Any:
    """The program of a nested call (jit, remat, custom derivatives) with the call's own inputs, or None."""
    for name in ("jaxpr", "call_jaxpr"):
        inner = equation.params.get(name)
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(equation.invars):
            return inner if len(inner.outvars) == len(equation.outvars) else None
    return None


def _add_sizes(variables: Any, noted: Mapping[str, _Noted]) -> None:
    """Counts every variable for the innermost noted module it lies in; a layer's quantizers are part of the layer."""
    for collection in ("params", "batch_stats"):
        flat: dict[str, Any] = flax.traverse_util.flatten_dict(variables.get(collection, {}), sep="/")
        for path, value in flat.items():
            owner = path
            while owner not in noted:
                owner = owner.rpartition("/")[0]
            place, size = noted[owner], math.prod(value.shape)
            if collection == "batch_stats":
                place.statistics += size
            elif path == f"{owner}/kernel":
                place.latent += size
            elif path.startswith(f"{owner}/weight_quantizer/") and path.endswith("/codebook"):
                place.codebook += size
            else:
                place.other_parameters += size


def _layer(path: str, noted: _Noted, activation_bits: float, with_kernel: list[str]) -> LayerComplexity:
    shape = noted.kernel_shape or ()
    weights = math.prod(shape) if shape else 0
    # A copy outside the network, only to be asked; where there is no kernel, the quantizer that does nothing.
    cost = (noted.module.weight_quantizer(parent=None) if shape else WeightQuantizer(parent=None)).cost(shape)
    quantized = cost.stored_bits < FLOAT_BITS
    floats = noted.other_parameters + noted.statistics + (cost.scales if quantized else noted.latent)
    return LayerComplexity(
        path=path,
        kind=noted.kind,
        kernel_shape=noted.kernel_shape,
        output_shape=noted.output_shape,
        parameters=noted.latent + noted.codebook + noted.other_parameters,
        weights=weights,
        weight_bits=cost.stored_bits,
        operation_bits=cost.operation_bits,
        activation_bits=activation_bits,
        # Every output position takes one multiply-accumulate per weight.
        macs=noted.positions * weights,
        shared_macs=noted.positions * cost.multiply_accumulates if shape else 0.0,
        quantized=quantized,
        full_precision_because="" if quantized else _reason(path, noted.kind, with_kernel),
        quantized_bits=round(cost.stored_bits * weights) if quantized else 0,
        codebook_bits=cost.codebook_bits,
        full_precision_bits=FLOAT_BITS * floats,
    )


def _reason(path: str, kind: str, with_kernel: list[str]) -> str:
    """Why a layer is not quantized, from its place in the network."""
    if kind == "batch_norm":
        return "batch norm"
    if path not in with_kernel:
        return "no kernel"
    if path == with_kernel[0]:
        return "first layer"
    if kind == "dense" and path == with_kernel[-1]:
        return "classifier"
    if path.rpartition("/")[2].startswith(("downsample", "shortcut")):
        return "shortcut"
    return "no quantizer"


class LevelUse(NamedTuple):
    """Levels of one layer that at least one weight takes.

    Attributes:
      levels: their number; where a level is a pattern of n weights, of patterns.
      bits: ceil(log2(levels)), the bits of an index into them, per weight: divided by n for patterns.
    """

    levels: int
    bits: float


def levels_in_use(
    network: nn.Module, variables: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> dict[str, LevelUse]:
    """Number of levels that trained weights really take, and the bits of an index into them, by path of the layer.

    A nominal k-bit layer can need fewer bits (levels that no weight takes) or more (a pruning mask adds the level 0;
    the 1-bit rule of the ASBQ release gives integer multiples of a scale).

    Args:
      network: (images, QuantContext) -> NetworkOutput.
      variables: trained variables of the network (params, batch_stats, quant_state).
      image_shape: (H, W, C) of the images it reads.
    """
    return {path: _use(weights) for path, weights in encoded_weights(network, variables, image_shape).items()}


def _use(weights: Encoded) -> LevelUse:
    levels = int(np.count_nonzero(np.bincount(np.ravel(weights.indices))))
    bits, weights_per_index = (levels - 1).bit_length(), math.prod(weights.levels.shape[1:])
    return LevelUse(levels=levels, bits=bits if weights_per_index == 1 else bits / weights_per_index)
