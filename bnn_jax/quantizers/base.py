"""What a quantizer is: the context it reads, the two base classes, and the encoded form.

A weight quantizer turns a layer's trainable ``kernel`` (its latent weights) into the kernel the convolution uses; an
activation quantizer turns a layer's input into the values the convolution uses. Both are small Linen modules, so they
may own parameters and state (collection ``quant_state``); the arithmetic lives in ``bnn_jax.ops``.

To add one: a function in ``ops``, a subclass here, a line in ``bnn_jax.quantizers.WEIGHT`` or ``ACT``.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from bnn_jax.knobs import Knob

Shape = tuple[int, ...]
Initializer = Callable[..., jax.Array]


@flax.struct.dataclass
class QuantContext:
    """Everything a module needs besides its input and its variables.

    Attributes:
      train: whether batch statistics are used and state may change (static).
      stream: 'quant' for the network itself, 'real' for the second, real-valued pass of self-distillation (static).
      step: int32 scalar, optimiser steps done before this one.
      knobs: values of the knobs by name: in training those of the step, else those stored with the network's variables.
      choice: int32 vector of chosen branches, or None outside a supernet.
      mask: (N,) bool, the valid rows of the batch; None means all.
    """

    train: bool = flax.struct.field(pytree_node=False, default=False)
    stream: str = flax.struct.field(pytree_node=False, default="quant")
    step: jax.Array | int = 0
    knobs: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    choice: jax.Array | None = None
    mask: jax.Array | None = None

    def knob(self, knob: Knob) -> jax.Array | float:
        """Value of a knob, or its default where none is given; building a stage has checked that none is forgotten."""
        return self.knobs.get(knob.name, knob.default)


def evaluation_context(
    variables: Mapping[str, Any], *, mask: jax.Array | None = None, choice: jax.Array | None = None
) -> QuantContext:
    """The context in which a network is evaluated: with the knobs that are stored in its own variables.

    Args:
      variables: variables of the network.
      mask: (N,) bool, the valid rows of the batch; None means all.
      choice: int32 vector of chosen branches, or None.
    """
    return QuantContext(knobs=variables.get("knobs", {}), mask=mask, choice=choice)


@flax.struct.dataclass
class Encoded:
    """Weights as table look-ups: ``levels[indices] * scale`` is the quantized kernel.

    Attributes:
      indices: unsigned integers of the kernel's shape.
      levels: (L,) float32, increasing.
      scale: float32, broadcastable to the kernel.
    """

    indices: jax.Array
    levels: jax.Array
    scale: jax.Array

    def decode(self) -> jax.Array:
        """The quantized kernel."""
        return self.levels[self.indices] * self.scale

    def per_weight(self) -> "Encoded":
        """The same with an index for every weight, which it is unless its indices stand for several weights each."""
        return self


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the weights of one layer cost; ``bnn_jax.report.costs`` defines the figures.

    Attributes:
      stored_bits: bits stored per weight; 32 where the weights are not quantized.
      operation_bits: bits of one weight as it is multiplied: more than those stored where patterns are looked up.
      multiply_accumulates: for one output position (all O outputs there), with the savings the method is for.
      codebook_bits: bits of the layer's own table of values that its weights are looked up in, stored beside them.
      scales: floats stored beside the weights that follow from the latent weights and are no parameters.
    """

    stored_bits: float
    operation_bits: float
    multiply_accumulates: float
    codebook_bits: int = 0
    scales: int = 0


def plain_cost(kernel_shape: Shape, bits: float, *, scales: int = 0) -> Cost:
    """Cost of weights that are each stored and multiplied in ``bits`` bits."""
    return Cost(float(bits), float(bits), float(math.prod(kernel_shape)), scales=scales)


class WeightQuantizer(nn.Module):
    """Base class of weight quantizers; the base itself is the identity (32-bit weights).

    Attributes:
      bits: nominal stored bits per weight.
    """

    bits: float = 32.0

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs this quantizer reads; a stage gives each of them a schedule."""
        return ()

    def cost(self, kernel_shape: Shape) -> Cost:
        """What a kernel (kh, kw, I/groups, O) or (I, O) costs; a quantizer around another one asks the inner one."""
        return plain_cost(kernel_shape, self.bits)

    @property
    def pictures(self) -> frozenset[str]:
        """Pictures a finished stage with such weights can show, keys of ``bnn_jax.report.pictures.PICTURES``."""
        return frozenset()

    def latent_shape(self, kernel_shape: Shape) -> Shape:
        """Shape of the trainable tensor behind a kernel of ``kernel_shape`` (kh, kw, I, O)."""
        return kernel_shape

    def latent_init(self, kernel_init: Initializer) -> Initializer:
        """Initialiser of the trainable tensor, given the layer's initialiser of kernels."""
        return kernel_init

    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        """Quantized kernel (kh, kw, I, O) from the latent weights."""
        return latent

    def real_kernel(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        """Real-valued view of the weights, for the real stream of self-distillation."""
        return latent

    def code_scale(self, latent: jax.Array, ctx: QuantContext) -> jax.Array | None:
        """Scale whose integer multiples, at most 256 in magnitude, are the quantized weights; None if there is none."""
        return None

    def encode(self, latent: jax.Array, ctx: QuantContext) -> Encoded | None:
        """Exact look-up form of the weights in an evaluation with ``ctx``, or None for real-valued weights."""
        return None


class ActQuantizer(nn.Module):
    """Base class of activation quantizers; the base itself is the identity (32-bit activations).

    Attributes:
      bits: bits per activation.
    """

    bits: float = 32.0

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs this quantizer reads; a stage gives each of them a schedule."""
        return ()

    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """Quantized activations of the shape of ``x`` (N, H, W, C)."""
        return x

    def levels(self, ctx: QuantContext) -> jax.Array | None:
        """The values activations can take, increasing, or None if they are not a fixed set."""
        return None

    def code_scale(self, ctx: QuantContext) -> jax.Array | float | None:
        """Scale whose integer multiples, at most 256 in magnitude, are the levels; None if there is none."""
        return None


def chosen_branch(ctx: QuantContext, index: int) -> jax.Array | int:
    """Branch that the context chooses for the searched layer ``index``; branch 0 where it holds no choice."""
    return 0 if ctx.choice is None else ctx.choice[index]


def encode_integers(codes: jax.Array, scale: jax.Array, lowest: int, highest: int, step: int = 1) -> Encoded:
    """Look-up form of ``codes * scale`` for integer codes ``lowest, lowest + step, ..., highest``.

    Args:
      codes: integers as floats, of the kernel's shape.
      scale: broadcastable to the kernel.
      lowest: smallest code.
      highest: largest code; at most 65,536 codes in all.
      step: distance of neighbouring codes.
    """
    levels = jnp.arange(lowest, highest + 1, step, dtype=jnp.float32)
    dtype = jnp.uint8 if levels.size <= 256 else jnp.uint16
    indices = jnp.round((codes - lowest) / step).astype(dtype)
    return Encoded(indices=indices, levels=levels, scale=jnp.asarray(scale, jnp.float32))


def validate_bits(bits: Any, accepted: range | tuple[int, ...], name: str) -> None:
    """Raises ValueError unless ``bits`` is one of ``accepted``."""
    if bits not in accepted:
        raise ValueError(f"{name}: bits={bits!r}: accepted are {', '.join(map(str, accepted))}")
