"""ReActNet's ResNets: a shortcut for every convolution, shifts in front of every sign and around every rectifier."""

import flax.linen as nn
import jax

from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import NetworkOutput, global_average_pool
from bnn_jax.networks.resnet import ResNet
from bnn_jax.ops.pooling import max_pool
from bnn_jax.quantizers.base import QuantContext


class ReActNet(ResNet):
    """Stem without activation, stages of one-convolution blocks, classifier.

    The first convolution, 1x1 shortcut convolutions and the classifier stay full precision. The CIFAR forms (3x3 stem
    without pooling, stage sizes) are ours: no such network was released.

    Attributes:
      stage_sizes: blocks, and so inner convolutions, per stage.
      imagenet_stem: 7x7 stem with stride 2 and max pooling (224x224 images); else 3x3.

    Reference: ReActNet, Liu et al. 2020 (arXiv 2003.03488); release: liuzechun/ReActNet: resnet/, yikaiw/SNN.
    """

    block: str = "reactnet"
    imagenet_stem: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) normalised images -> logits (N, K), features (N, widths[-1])."""
        stem = {"kernel_size": (7, 7), "strides": (2, 2), "padding": ((3, 3), (3, 3))} if self.imagenet_stem else {}
        x = BatchNorm(name="bn1")(self.layers.first_conv(self.widths[0], name="conv1", **stem)(x, ctx), ctx)
        if self.imagenet_stem:
            x = max_pool(x, size=3, stride=2, padding=1)
        return self.classify(global_average_pool(self.blocks(x, ctx)), ctx)
