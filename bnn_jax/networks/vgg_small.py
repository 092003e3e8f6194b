"""VGG-Small: six 3x3 convolutions and one dense layer, the usual plain network of binary CIFAR work."""

from typing import ClassVar

import flax.linen as nn
import jax

from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import Layers, NetworkOutput, flatten_channels_first, keep_feature
from bnn_jax.ops.pooling import max_pool
from bnn_jax.ops.ste import relu6
from bnn_jax.quantizers.base import QuantContext


class Vgg(nn.Module):
    """Base of the plain networks: six groups convolution, (pooling), BatchNorm, activation; then the classifier.

    The features are flattened channel by channel (C, H, W), as the published weights expect.

    Attributes:
      layers: layer factories.
      num_classes: outputs K.
      widths: channels of the six convolutions; the second of each pair is followed by 2x2 max pooling.
    """

    layers: Layers
    num_classes: int
    widths: tuple[int, ...] = (128, 128, 256, 256, 512, 512)

    unused_parameters: ClassVar[tuple[str, ...]] = ()
    first_compared: ClassVar[int] = 1
    """The first group whose output the two streams of self-distillation compare."""

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) normalised images, H and W multiples of 8 -> logits (N, K), features (N, H/8 * W/8 * C)."""
        for index, width in enumerate(self.widths):
            make = self.layers.first_conv if index == 0 else self.layers.conv
            x = make(width, name=f"conv{index}")(x, ctx)
            if index % 2:
                x = max_pool(x, size=2, stride=2)
            x = self.activate(BatchNorm(name=f"bn{index}")(x, ctx))
            if index >= self.first_compared:
                keep_feature(self, f"after_conv{index}", x)
        features = flatten_channels_first(self.before_classifier(x, ctx))
        dense = self.layers.dense(
            self.num_classes, kernel_init=nn.initializers.normal(0.01), bias_init=nn.initializers.zeros, name="fc"
        )
        return NetworkOutput(logits=dense(features, ctx), features=features)

    def activate(self, x: jax.Array) -> jax.Array:
        """What follows every BatchNorm."""
        raise NotImplementedError

    def before_classifier(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """What is done to the last feature map before it is flattened; called inside the compact ``__call__``."""
        return x


class VggSmall(Vgg):
    """VGG-Small of ReLU6, with a quantizer before the classifier.

    Reference: ASBQ specification, section 2.6; release: Luadoo/ASBQ: quantization/vgg_small.py.
    """

    first_compared = 0

    def activate(self, x: jax.Array) -> jax.Array:
        return relu6(x)

    def before_classifier(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        return self.layers.act(name="last_act")(x, ctx)
