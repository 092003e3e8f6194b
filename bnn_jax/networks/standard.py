"""The ordinary ReLU networks: post-activation ResNets for CIFAR and ImageNet, and VGG-Small.

They are what low-bit networks are compared with and taught by. Parameters have the names and shapes of the usual
ImageNet weights of PyTorch, which ``storage/pytorch.py`` reads. ReLU has the gradient 0 at exactly 0.
"""

import flax.linen as nn
import jax

from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import NetworkOutput, global_average_pool, he_fan_in_normal
from bnn_jax.networks.resnet import ResNet
from bnn_jax.networks.vgg_small import Vgg
from bnn_jax.ops.pooling import max_pool
from bnn_jax.quantizers.base import QuantContext


class StandardResNet(ResNet):
    """Convolution, BatchNorm, ReLU; residual blocks with ReLU behind the sum; average pooling; classifier.

    Attributes:
      imagenet_stem: 7x7 stem with stride 2 and max pooling (224x224 images); else 3x3.

    Reference: He et al. 2016 (arXiv 1512.03385); release: qinglu0330/DNN-weight-search: core/network.
    """

    block: str = "post_activation"
    imagenet_stem: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) normalised images -> logits (N, K), features (N, widths[-1], or 4 times that of bottlenecks)."""
        stem = {"kernel_size": (7, 7), "strides": (2, 2), "padding": ((3, 3), (3, 3))} if self.imagenet_stem else {}
        x = self.layers.first_conv(self.widths[0], name="conv1", **stem)(x, ctx)
        x = nn.relu(BatchNorm(name="bn1")(x, ctx))
        if self.imagenet_stem:
            x = max_pool(x, size=3, stride=2, padding=1)
        features = global_average_pool(self.blocks(x, ctx))
        return self.classify(features, ctx, kernel_init=None if self.imagenet_stem else he_fan_in_normal)


class StandardVgg(Vgg):
    """VGG-Small with ReLU: convolution, (pooling), BatchNorm, ReLU; the classifier reads the flattened features.

    Reference: release: qinglu0330/DNN-weight-search: core/network/vgg_small.py.
    """

    def activate(self, x: jax.Array) -> jax.Array:
        return nn.relu(x)
