"""VGG-Small: six 3x3 convolutions and one dense layer, the usual plain network of binary CIFAR work."""

import flax.linen as nn
import jax

from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import Layers, NetworkOutput, flatten_channels_first, keep_feature
from bnn_jax.ops.ste import relu6
from bnn_jax.quantizers.base import QuantContext


class VggSmall(nn.Module):
    """Six groups convolution, (pooling), BatchNorm, ReLU6, quantizer; then the classifier on the flattened features.

    The features are flattened channel by channel (C, H, W), as the published weights expect.

    Attributes:
      layers: layer factories.
      num_classes: outputs K.
      widths: channels of the six convolutions; the second of each pair is followed by 2x2 max pooling.

    Reference: ASBQ specification, section 2.6; release: Luadoo/ASBQ: quantization/vgg_small.py.
    """

    layers: Layers
    num_classes: int
    widths: tuple[int, ...] = (128, 128, 256, 256, 512, 512)

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """No parameter goes without a gradient."""
        return ()

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) normalised images, H and W multiples of 8 -> logits (N, K), features (N, H/8 * W/8 * C)."""
        for index, width in enumerate(self.widths):
            make = self.layers.first_conv if index == 0 else self.layers.conv
            x = make(width, name=f"conv{index}")(x, ctx)
            if index % 2:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = relu6(BatchNorm(name=f"bn{index}")(x, ctx))
            keep_feature(self, f"after_conv{index}", x)
        x = self.layers.act(name="last_act")(x, ctx)
        features = flatten_channels_first(x)
        dense = self.layers.dense(
            self.num_classes,
            kernel_init=nn.initializers.normal(0.01),
            bias_init=nn.initializers.zeros,
            name="fc",
        )
        return NetworkOutput(logits=dense(features, ctx), features=features)
