"""Convolution and dense layers with a slot for a weight quantizer and one for an activation quantizer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnn_jax.ops import convolution as own
from bnn_jax.ops.depthwise import depthwise_convolution
from bnn_jax.quantizers.base import ActQuantizer, QuantContext, WeightQuantizer

Padding = tuple[tuple[int, int], tuple[int, int]]

LAYOUT = ("NHWC", "HWIO", "NHWC")


def fan_in_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform on +-1/sqrt(fan_in), the published default; fan_in is the product of all axes but the last."""
    bound = 1.0 / float(_product(shape[:-1])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


class QuantConv(nn.Module):
    """Convolution of quantized activations with quantized weights.

    Forward: ``y = conv(act_quantizer(x), weight_quantizer(kernel)) + bias``, NHWC, explicit zero padding (zeros are a
      third value beside -1 and +1, as in the published networks).
    Backward: ordinary convolution gradients at the quantized operands, then the quantizers' own.

    With ``compute_dtype='bfloat16'`` and two quantizers that give integer codes of at most 8 bits, the forward
    convolution runs on the codes in bfloat16 (exact operands, float32 sums) and is scaled afterwards; otherwise it is
    float32.

    Attributes:
      features: output channels O.
      kernel_size: (height, width).
      strides: (vertical, horizontal).
      padding: ((top, bottom), (left, right)), in pixels.
      groups: feature groups.
      use_bias: whether a bias (O,) is added.
      weight_quantizer: factory of the weight quantizer.
      act_quantizer: factory of the activation quantizer of the input.
      kernel_init: initialiser of the kernel (kh, kw, I/groups, O).
      compute_dtype: 'float32' or 'bfloat16'.
      cpu_kernels: 'auto': kernels of our own where they can be used, see ``ops.convolution``; 'xla': XLA's.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Padding = ((1, 1), (1, 1))
    groups: int = 1
    use_bias: bool = False
    weight_quantizer: Callable[..., WeightQuantizer] = WeightQuantizer
    act_quantizer: Callable[..., ActQuantizer] = ActQuantizer
    kernel_init: Callable[..., jax.Array] = fan_in_uniform
    compute_dtype: str = "float32"
    cpu_kernels: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, I) -> (N, H', W', O), float32."""
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        convolve = _Convolution(self.strides, self.padding, self.groups, self.cpu_kernels)

        def multiply(x: jax.Array, kernel: jax.Array, scales: tuple | None) -> jax.Array:
            return convolve(x, kernel) if scales is None else convolve_codes(convolve, x, kernel, *scales)

        y = quantized_product(self, x, shape, ctx, multiply=multiply)
        return _add_bias(self, y, fan_in=_product(shape[:-1]))


class QuantDense(nn.Module):
    """Dense layer of quantized activations with quantized weights.

    Forward: ``y = act_quantizer(x) @ weight_quantizer(kernel) + bias``.
    Backward: ordinary gradients at the quantized operands, then the quantizers' own.

    Attributes:
      features: outputs O.
      use_bias: whether a bias (O,) is added, initialised uniformly on +-1/sqrt(inputs) unless ``bias_init`` is given.
      weight_quantizer: factory of the weight quantizer; it sees a kernel (I, O).
      act_quantizer: factory of the activation quantizer.
      kernel_init: initialiser of the kernel (I, O).
      bias_init: initialiser of the bias, or None for the default.
    """

    features: int
    use_bias: bool = True
    weight_quantizer: Callable[..., WeightQuantizer] = WeightQuantizer
    act_quantizer: Callable[..., ActQuantizer] = ActQuantizer
    kernel_init: Callable[..., jax.Array] = fan_in_uniform
    bias_init: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, I) -> (N, O), float32."""
        shape = (x.shape[-1], self.features)
        y = quantized_product(self, x, shape, ctx, multiply=lambda x, kernel, _: x @ kernel)
        return _add_bias(self, y, fan_in=shape[0])


def quantized_product(
    layer: Any, x: jax.Array, shape: tuple[int, ...], ctx: QuantContext, *, multiply: Callable[..., jax.Array]
) -> jax.Array:
    """The layer's output before its bias, in the stream of ``ctx``.

    Called inside the layer's compact ``__call__``: creates the parameter ``kernel`` and the two quantizers.

    Forward, stream 'quant': ``y = multiply(act_quantizer(x), weight_quantizer(kernel))``; y is kept in the collection
      'taps' if the caller asks for that collection.
    Forward, stream 'real': ``|y| * sign(multiply(x, real_kernel))`` with the y of the first pass, read from 'taps':
      only the sign comes from real values. A layer whose weights are not quantized works as in the stream 'quant'.
    Backward: the stream 'real' has no gradient.

    Args:
      layer: the QuantConv or QuantDense.
      x: input.
      shape: shape of the kernel.
      ctx: context.
      multiply: (x, kernel, scales) -> output; ``scales`` are those of the two operands where both are integer codes to
        be multiplied in bfloat16, else None.

    Reference: release: Wzixin/SKD-BNN ("value swapping").
    """
    weight_quantizer = layer.weight_quantizer(name="weight_quantizer")
    act_quantizer = layer.act_quantizer(name="act_quantizer")
    latent_init = weight_quantizer.latent_init(layer.kernel_init)
    latent = layer.param("kernel", latent_init, weight_quantizer.latent_shape(shape))
    quantized = weight_quantizer.cost(shape).stored_bits < 32
    if ctx.stream == "real" and quantized:
        magnitude = jnp.abs(layer.get_variable("taps", "output"))
        return jax.lax.stop_gradient(magnitude * jnp.sign(multiply(x, weight_quantizer.real_kernel(latent, ctx), None)))
    scales = None
    if getattr(layer, "compute_dtype", "float32") == "bfloat16":
        pair = (act_quantizer.code_scale(ctx), weight_quantizer.code_scale(latent, ctx))
        scales = None if any(scale is None for scale in pair) else pair
    y = multiply(act_quantizer(x, ctx), weight_quantizer(latent, ctx), scales)
    if quantized:
        keep_latest(layer, "taps", "output", y)
    return y


def keep_latest(module: nn.Module, collection: str, name: str, value: jax.Array) -> None:
    """Hands a value to whoever applies the network with ``collection`` mutable; without effect otherwise."""
    if module.is_initializing():
        return  # Fresh variables are those that are trained and saved.
    module.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: value)


def _add_bias(layer: Any, y: jax.Array, fan_in: int) -> jax.Array:
    if not layer.use_bias:
        return y
    bound = 1.0 / fan_in**0.5

    def default_init(key, shape):
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    bias_init = getattr(layer, "bias_init", None) or default_init
    return y + layer.param("bias", bias_init, (layer.features,)).reshape((1,) * (y.ndim - 1) + (-1,))


class _Convolution:
    """Convolution with fixed strides, padding, groups and kernels: a hashable function of two operands."""

    def __init__(self, strides: tuple[int, int], padding: Padding, groups: int, cpu_kernels: str):
        self.strides, self.padding, self.groups, self.cpu_kernels = strides, padding, groups, cpu_kernels

    def _key(self):
        return (self.strides, self.padding, self.groups, self.cpu_kernels)

    def __hash__(self):
        return hash(self._key())

    def __eq__(self, other):
        return isinstance(other, _Convolution) and self._key() == other._key()

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        is_depthwise = 1 < self.groups == x.shape[-1] == kernel.shape[-1]
        if is_depthwise and x.dtype == jnp.float32 and jax.default_backend() == "cpu":
            # XLA's grouped convolution is many times slower there; elsewhere it is left to the library.
            return depthwise_convolution(x, kernel, self.strides, self.padding)
        if own.is_supported(x, kernel, self.padding, self.groups) and own.choice(self.cpu_kernels) != "xla":
            return own.convolution(x, kernel, self.strides, self.padding)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.padding,
            dimension_numbers=LAYOUT,
            feature_group_count=self.groups,
            # bfloat16 operands give float32 sums; wider operands keep their type.
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )


def convolve_codes(
    convolve: _Convolution, x: jax.Array, kernel: jax.Array, x_scale: Any, kernel_scale: Any
) -> jax.Array:
    """Convolution of two operands that are integer multiples of a scale, with exact bfloat16 operands.

    Forward: ``y = conv(round(x/x_scale), round(kernel/kernel_scale)) * x_scale * kernel_scale``; the codes are at
      most 256 in magnitude, so bfloat16 holds them exactly, and sums are float32.
    Backward: float32 gradients of ``conv(x, kernel)``, since a cotangent is no integer code.

    Args:
      convolve: the convolution.
      x: (N, H, W, I), float32.
      kernel: (kh, kw, I, O), float32.
      x_scale: scalar.
      kernel_scale: scalar, or (1, 1, 1, O).
    """
    return _convolve_codes(convolve, x, kernel, jnp.float32(x_scale), jnp.asarray(kernel_scale, jnp.float32))


def _codes(values: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.round(values / jnp.where(scale == 0, 1.0, scale)).astype(jnp.bfloat16)


def _convolve_codes_value(convolve, x, kernel, x_scale, kernel_scale):
    return convolve(_codes(x, x_scale), _codes(kernel, kernel_scale)) * (x_scale * kernel_scale)


_convolve_codes = jax.custom_vjp(_convolve_codes_value, nondiff_argnums=(0,))


def _convolve_codes_forward(convolve, x, kernel, x_scale, kernel_scale):
    return _convolve_codes_value(convolve, x, kernel, x_scale, kernel_scale), (x, kernel, x_scale, kernel_scale)


def _convolve_codes_backward(convolve, residuals, cotangent):
    x, kernel, x_scale, kernel_scale = residuals
    _, transpose = jax.vjp(convolve, x, kernel)
    return (*transpose(cotangent), jnp.zeros_like(x_scale), jnp.zeros_like(kernel_scale))


_convolve_codes.defvjp(_convolve_codes_forward, _convolve_codes_backward)
