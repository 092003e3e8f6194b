"""Residual blocks of the published low-bit networks: where normalisation, quantizer and shortcut stand differs."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnn_jax.layers.activation import LearnableBias, RPRelu
from bnn_jax.layers.norm import BatchNorm
from bnn_jax.layers.shortcut import average_pool
from bnn_jax.networks.base import Layers, keep_feature
from bnn_jax.ops.ste import hard_tanh, relu6
from bnn_jax.quantizers.base import QuantContext


class ResidualBlock(nn.Module):
    """Base of the residual blocks: convolutions and a shortcut.

    The shortcut is the identity, or a 1x1 convolution and BatchNorm where the stride or the number of channels changes.

    Attributes:
      features: output channels.
      stride: spatial stride of the first convolution and the shortcut.
      layers: layer factories.
      pad_shortcut: whether a shortcut that changes shape takes every second position and pads the channels with zeros
        instead ("option A" of He et al. 2016, arXiv 1512.03385).
    """

    features: int
    stride: int
    layers: Layers
    pad_shortcut: bool = False

    @property
    def output_features(self) -> int:
        """Channels of the block's output."""
        return self.features

    def downsamples(self, x: jax.Array) -> bool:
        """Whether the shortcut changes the shape of input ``x``."""
        return self.stride != 1 or x.shape[-1] != self.output_features

    def shortcut(self, identity: jax.Array, source: jax.Array, ctx: QuantContext) -> jax.Array:
        """``identity`` where shapes agree, else ``source`` padded, or its strided 1x1 convolution and BatchNorm."""
        if not self.downsamples(identity):
            return identity
        if self.pad_shortcut:
            return self.padded(source)
        conv = self.layers.shortcut_conv(
            self.output_features,
            kernel_size=(1, 1),
            strides=(self.stride, self.stride),
            padding=((0, 0), (0, 0)),
            name="downsample_conv",
        )
        return BatchNorm(name="downsample_bn")(conv(source, ctx), ctx)

    def padded(self, x: jax.Array) -> jax.Array:
        """Every ``stride``-th position of ``x``, with half of the new channels as zeros on either side."""
        missing = self.output_features - x.shape[-1]
        channels = (missing // 2, missing - missing // 2)
        return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), channels))

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
        keep_feature(self, "after_conv1", h)
        z = conv2(relu6(BatchNorm(name="bn2")(h, ctx)), ctx) + self.shortcut(x, x, ctx)
        keep_feature(self, "after_conv2", z)
        return z


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
        keep_feature(self, "after_conv1", h)
        conv2 = self.layers.conv(self.features, name="conv2")
        z = conv2(relu6(BatchNorm(name="bn2")(h, ctx)), ctx) + self.shortcut(x, a, ctx)
        keep_feature(self, "after_conv2", z)
        return z


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
        keep_feature(self, "after_conv1", h)
        z = conv2(BatchNorm(name="bn2")(self.layers.act(name="act2")(relu6(h), ctx), ctx), ctx)
        z = z + self.shortcut(x, x, ctx)
        keep_feature(self, "after_conv2", z)
        return z


class HardTanhBlock(ResidualBlock):
    """Binary block of IR-Net and SKD-BNN: quantizer inside the convolution, BatchNorm, shortcut, clip to [-1, 1].

    Forward, ``double_skip``: ``a1 = ht(bn1(conv1(x)) + s(x)); a2 = ht(bn2(conv2(a1)) + a1)``; else, single skip:
      ``a1 = ht(bn1(conv1(x))); a2 = ht(bn2(conv2(a1)) + s(x))``, ht = clip to [-1, 1].

    Attributes:
      double_skip: whether every convolution has a shortcut of its own.

    Reference: IR-Net, Qin et al. 2020 (arXiv 1909.10788); release: Wzixin/SKD-BNN.
    """

    double_skip: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H/stride, W/stride, features), values in [-1, 1]."""
        y1 = self.layers.conv(self.features, strides=self.strides, name="conv1")(x, ctx)
        y1 = BatchNorm(name="bn1")(y1, ctx)
        skip = self.shortcut(x, x, ctx)
        a1 = hard_tanh(y1 + skip if self.double_skip else y1)
        keep_feature(self, "after_conv1", a1)
        y2 = BatchNorm(name="bn2")(self.layers.conv(self.features, name="conv2")(a1, ctx), ctx)
        a2 = hard_tanh(y2 + (a1 if self.double_skip else skip))
        keep_feature(self, "after_conv2", a2)
        return a2


class PostActivationBlock(ResidualBlock):
    """The original residual block: convolution, BatchNorm, ReLU, convolution, BatchNorm, shortcut, ReLU.

    Forward: ``h = relu(bn1(conv1(x))); z = relu(bn2(conv2(h)) + s(x))``.

    Reference: He et al. 2016 (arXiv 1512.03385), figure 5 left; release: qinglu0330/DNN-weight-search: core/network.
    """

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H/stride, W/stride, features), values from 0."""
        h = self.layers.conv(self.features, strides=self.strides, name="conv1")(x, ctx)
        h = nn.relu(BatchNorm(name="bn1")(h, ctx))
        keep_feature(self, "after_conv1", h)
        z = BatchNorm(name="bn2")(self.layers.conv(self.features, name="conv2")(h, ctx), ctx)
        z = nn.relu(z + self.shortcut(x, x, ctx))
        keep_feature(self, "after_conv2", z)
        return z


class BottleneckBlock(ResidualBlock):
    """Three convolutions, 1x1, 3x3 with the stride and 1x1 to four times the channels, each with BatchNorm.

    Forward: ``h1 = relu(bn1(conv1(x))); h2 = relu(bn2(conv2(h1))); z = relu(bn3(conv3(h2)) + s(x))``.

    Attributes:
      features: channels of the inner convolutions; the output has ``4 * features``.

    Reference: He et al. 2016 (arXiv 1512.03385), figure 5 right, with the stride on the 3x3 convolution as in the
      published weights ("ResNet v1.5").
    """

    @property
    def output_features(self) -> int:
        return 4 * self.features

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H/stride, W/stride, 4 * features), values from 0."""
        pointwise = functools.partial(self.layers.conv, kernel_size=(1, 1), padding=((0, 0), (0, 0)))
        h = nn.relu(BatchNorm(name="bn1")(pointwise(self.features, name="conv1")(x, ctx), ctx))
        keep_feature(self, "after_conv1", h)
        h = self.layers.conv(self.features, strides=self.strides, name="conv2")(h, ctx)
        h = nn.relu(BatchNorm(name="bn2")(h, ctx))
        keep_feature(self, "after_conv2", h)
        z = BatchNorm(name="bn3")(pointwise(self.output_features, name="conv3")(h, ctx), ctx)
        z = nn.relu(z + self.shortcut(x, x, ctx))
        keep_feature(self, "after_conv3", z)
        return z


class ReActBlock(ResidualBlock):
    """One binary convolution with a shortcut of its own, between a shifted sign and a shifted rectifier.

    Forward: ``z = bn1(conv1(x + sign_shift)) + s(x); out = rprelu(z)``; the sign is the convolution's activation
      quantizer. A shortcut that changes shape is 2x2 average pooling, a 1x1 convolution and BatchNorm.

    Reference: ReActNet, Liu et al. 2020 (arXiv 2003.03488), figure 5; release: liuzechun/ReActNet: resnet/, yikaiw/SNN.
    """

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H/stride, W/stride, features)."""
        conv1 = self.layers.conv(self.features, strides=self.strides, name="conv1")
        z = BatchNorm(name="bn1")(conv1(LearnableBias(name="sign_shift")(x), ctx), ctx) + self.pooled_shortcut(x, ctx)
        z = RPRelu(name="rprelu")(z)
        keep_feature(self, "after_conv1", z)
        return z

    def pooled_shortcut(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """``x`` where shapes agree, else its mean over ``stride`` x ``stride`` positions, 1x1 convolved, normalised."""
        if not self.downsamples(x):
            return x
        pooled = average_pool(x, self.stride)
        conv = self.layers.shortcut_conv(
            self.features, kernel_size=(1, 1), padding=((0, 0), (0, 0)), name="downsample_conv"
        )
        return BatchNorm(name="downsample_bn")(conv(pooled, ctx), ctx)


BLOCKS: dict[str, Callable[..., ResidualBlock]] = {
    "release": PreActivationBlock,
    "checkpoint": RealInputBlock,
    "imagenet": NormAfterQuantizerBlock,
    "double_skip": HardTanhBlock,
    "double_skip_padded": functools.partial(HardTanhBlock, pad_shortcut=True),
    "single_skip": functools.partial(HardTanhBlock, double_skip=False),
    "post_activation": PostActivationBlock,
    "post_activation_padded": functools.partial(PostActivationBlock, pad_shortcut=True),
    "bottleneck": BottleneckBlock,
    "reactnet": ReActBlock,
}
