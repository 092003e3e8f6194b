"""Residual blocks of the published low-bit networks: where normalisation, quantizer and shortcut stand differs."""

import flax.linen as nn
import jax

from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import Layers, he_fan_out_normal
from bnn_jax.ops.ste import relu6
from bnn_jax.quantizers.base import QuantContext


class ResidualBlock(nn.Module):
    """Base of the residual blocks: two 3x3 convolutions and a shortcut.

    The shortcut is the identity, or a 1x1 convolution and BatchNorm where the stride or the number of channels changes.

    Attributes:
      features: output channels.
      stride: spatial stride of the first convolution and the shortcut.
      layers: layer factories.
    """

    features: int
    stride: int
    layers: Layers

    def downsamples(self, x: jax.Array) -> bool:
        """Whether the shortcut needs a convolution for input ``x``."""
        return self.stride != 1 or x.shape[-1] != self.features

    def shortcut(self, identity: jax.Array, source: jax.Array, ctx: QuantContext) -> jax.Array:
        """``identity`` where shapes agree, else the strided 1x1 convolution and BatchNorm of ``source``."""
        if not self.downsamples(identity):
            return identity
        conv = self.layers.shortcut_conv(
            self.features,
            kernel_size=(1, 1),
            strides=(self.stride, self.stride),
            padding=((0, 0), (0, 0)),
            kernel_init=he_fan_out_normal,
            name="downsample_conv",
        )
        return BatchNorm(name="downsample_bn")(conv(source, ctx), ctx)

    @property
    def strides(self) -> tuple[int, int]:
        """The stride as the convolution takes it."""
        return (self.stride, self.stride)


class PreActivationBlock(ResidualBlock):
    """BatchNorm, ReLU6, quantizer, convolution, twice; both convolutions read quantized values.

    Forward: ``a = A(bn1(x)); h = conv1(a); z = conv2(A(bn2(h))); out = z + (d(x) or x)`` with A = quantizer(relu6(.)).

    Reference: ASBQ, `release` block; release: Luadoo/ASBQ: quantization/resnet_quant.py (March 2026).
    """

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H/stride, W/stride, features)."""
        conv1 = self.layers.conv(self.features, strides=self.strides, name="conv1")
        conv2 = self.layers.conv(self.features, name="conv2")
        h = conv1(relu6(BatchNorm(name="bn1")(x, ctx)), ctx)
        z = conv2(relu6(BatchNorm(name="bn2")(h, ctx)), ctx)
        return z + self.shortcut(x, x, ctx)


class RealInputBlock(ResidualBlock):
    """The block the released checkpoint was trained with: its first convolution reads the unquantized input.

    Forward: ``a = A(bn1(x)); h = conv1(x); z = conv2(A(bn2(h))); out = z + (d(a) or x)``. Where the shortcut is the
      identity, bn1's output is not used: its scale and bias get no gradient, but its running statistics follow.

    Reference: ASBQ, `checkpoint` block, deduced from the released file; in no released commit.
    """

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H/stride, W/stride, features)."""
        a = self.layers.act(name="act1")(relu6(BatchNorm(name="bn1")(x, ctx)), ctx)
        h = self.layers.conv_without_act(self.features, strides=self.strides, name="conv1")(x, ctx)
        z = self.layers.conv(self.features, name="conv2")(relu6(BatchNorm(name="bn2")(h, ctx)), ctx)
        return z + self.shortcut(x, a, ctx)


class NormAfterQuantizerBlock(ResidualBlock):
    """ReLU6, quantizer, BatchNorm, convolution, twice; the shortcut carries the clipped input.

    Forward: ``x' = relu6(x); a = bn1(quantizer(x')); h = conv1(a); z = conv2(bn2(A(h))); out = z + (d(x') or x')``.
      Convolution inputs take 2**bits values per channel, on a grid of their own in every channel.

    Reference: ASBQ, `imagenet` block; release: Luadoo/ASBQ: quantization/resnet_imagenet.py, whose in-place ReLU6
      clips the shortcut too.
    """

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H/stride, W/stride, features)."""
        conv1 = self.layers.conv_without_act(self.features, strides=self.strides, name="conv1")
        conv2 = self.layers.conv_without_act(self.features, name="conv2")
        x = relu6(x)
        a = BatchNorm(name="bn1")(self.layers.act(name="act1")(x, ctx), ctx)
        h = conv1(a, ctx)
        z = conv2(BatchNorm(name="bn2")(self.layers.act(name="act2")(relu6(h), ctx), ctx), ctx)
        return z + self.shortcut(x, x, ctx)


BLOCKS: dict[str, type[ResidualBlock]] = {
    "release": PreActivationBlock,
    "checkpoint": RealInputBlock,
    "imagenet": NormAfterQuantizerBlock,
}
