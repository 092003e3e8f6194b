"""What every network shares: its output, and the layers it is handed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from bnn_jax.knobs import Knob
from bnn_jax.layers.conv import keep_latest
from bnn_jax.quantizers.base import ActQuantizer


@flax.struct.dataclass
class NetworkOutput:
    """What a network returns.

    Attributes:
      logits: (N, K), float32.
      features: (N, D), float32, the input of the classifier.
    """

    logits: jax.Array
    features: jax.Array


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layer factories a network builds itself from; quantizers and compute type are already bound.

    Attributes:
      conv: inner convolution with weight and activation quantizer.
      first_conv: first convolution, reading the image.
      shortcut_conv: 1x1 convolution on a shortcut.
      dense: classifier.
      inner_dense: hidden dense layer with weight and activation quantizer.
      act: activation quantizer on its own, for blocks that quantize somewhere else than at a convolution's input.
      searched_act: activation quantizer with branches: (index, branches) -> factory; 32-bit activations by default.
      remat: whether the backward pass computes the inside of every block a second time instead of keeping it.
      knobs: what the quantizers read.
    """

    conv: Callable[..., nn.Module]
    first_conv: Callable[..., nn.Module]
    shortcut_conv: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    inner_dense: Callable[..., nn.Module]
    act: Callable[..., ActQuantizer]
    searched_act: Callable[..., Callable[..., ActQuantizer]] = lambda index, branches: ActQuantizer
    remat: bool = False
    knobs: tuple[Knob, ...] = ()

    def block(self, make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """A block's class, or a partial of one, as networks are to build it."""
        if not self.remat:
            return make
        if isinstance(make, functools.partial):
            return functools.partial(nn.remat(make.func), *make.args, **make.keywords)
        return nn.remat(make)

    def conv_without_act(self, *args: Any, **options: Any) -> nn.Module:
        """An inner convolution whose input is taken as it is."""
        return self.conv(*args, act_quantizer=ActQuantizer, **options)

    def searched_conv(self, *args: Any, index: int, branches: int, **options: Any) -> nn.Module:
        """An inner convolution whose activation quantizer has branches, chosen at ``index`` of ``ctx.choice``."""
        return self.conv(*args, act_quantizer=self.searched_act(index, branches), **options)

    def inner_dense_without_act(self, *args: Any, **options: Any) -> nn.Module:
        """A hidden dense layer whose input is taken as it is."""
        return self.inner_dense(*args, act_quantizer=ActQuantizer, **options)


def knobs_of(network: nn.Module) -> tuple[Knob, ...]:
    """The knobs that the quantizers of a network read."""
    layers = getattr(network, "layers", None)
    return () if layers is None else layers.knobs


def flatten_channels_first(x: jax.Array) -> jax.Array:
    """(N, H, W, C) -> (N, C * H * W), channel by channel, as published classifier weights expect."""
    return jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)


def keep_feature(module: nn.Module, name: str, value: jax.Array) -> None:
    """Hands out an intermediate feature map in the collection 'block_features'.

    The two streams of self-distillation are compared at these places.
    """
    keep_latest(module, "block_features", name, value)


def he_fan_out_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal with standard deviation sqrt(2 / (kh * kw * O)) for a kernel (kh, kw, I, O)."""
    return jax.random.normal(key, shape, dtype) * (2.0 / (shape[0] * shape[1] * shape[-1])) ** 0.5


def he_fan_in_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal with standard deviation sqrt(2 / fan_in); fan_in is the product of all axes but the last."""
    return nn.initializers.variance_scaling(2.0, "fan_in", "normal")(key, shape, dtype)


def uniform_hundredth(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform on +-0.01, whatever the shape.

    Reference: release: HanByulKim/BASQ: mbv2_supernet.py.
    """
    return jax.random.uniform(key, shape, dtype, -0.01, 0.01)


def xavier_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal with standard deviation sqrt(2 / (inputs + outputs)) for a kernel (I, O)."""
    return jax.random.normal(key, shape, dtype) * (2.0 / (shape[0] + shape[1])) ** 0.5


def global_average_pool(x: jax.Array) -> jax.Array:
    """(N, H, W, C) -> (N, C), the mean over all positions."""
    return jnp.mean(x, axis=(1, 2))
