"""Binary networks of IR-Net and SKD-BNN: activations clipped to [-1, 1], binarised inside the next convolution."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import (
    Layers,
    NetworkOutput,
    global_average_pool,
    he_fan_in_normal,
    keep_feature,
)
from bnn_jax.networks.resnet import ResNet
from bnn_jax.networks.vgg_small import Vgg
from bnn_jax.ops.pooling import max_pool
from bnn_jax.ops.ste import hard_tanh
from bnn_jax.quantizers.base import QuantContext


class HardTanhResNet(ResNet):
    """ResNet with a normalised stem; the pooled features are normalised once more before the classifier.

    The first convolution, 1x1 shortcut convolutions and the classifier stay full precision.

    Attributes:
      imagenet_stem: 7x7 stem with stride 2 and max pooling (224x224 images); else 3x3.

    Reference: IR-Net, Qin et al. 2020 (arXiv 1909.10788); release: Wzixin/SKD-BNN (section 2.5 of its specification).
    """

    block: str = "double_skip"
    imagenet_stem: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) normalised images -> logits (N, K), features (N, widths[-1])."""
        stem = {"kernel_size": (7, 7), "strides": (2, 2), "padding": ((3, 3), (3, 3))} if self.imagenet_stem else {}
        x = self.layers.first_conv(self.widths[0], name="conv1", **stem)(x, ctx)
        x = hard_tanh(BatchNorm(name="bn1")(x, ctx))
        if self.imagenet_stem:
            x = max_pool(x, size=3, stride=2, padding=1)
        features = BatchNorm(name="bn2")(global_average_pool(self.blocks(x, ctx)), ctx)
        return self.classify(features, ctx, kernel_init=None if self.imagenet_stem else he_fan_in_normal)


class HardTanhVgg(Vgg):
    """VGG-Small with a full-precision first convolution: convolution, (pooling), BatchNorm, clip to [-1, 1].

    Reference: IR-Net, Qin et al. 2020 (arXiv 1909.10788); release: Wzixin/SKD-BNN.
    """

    def activate(self, x: jax.Array) -> jax.Array:
        return hard_tanh(x)


class HardTanhMlp(nn.Module):
    """Three binary dense layers and a full-precision classifier, for flattened images with pixels in [0, 1].

    Forward, layer i: dense -> (dropout before the last BatchNorm) -> BatchNorm -> clip to [-1, 1]. The first layer
    reads the pixels as they are; the others binarise their input.

    Attributes:
      layers: layer factories.
      num_classes: outputs K.
      hidden: units of each hidden layer.
      dropout: share of the third layer's outputs set to zero in training.

    Reference: release: Wzixin/SKD-BNN, MNIST.
    """

    layers: Layers
    num_classes: int
    hidden: int = 2048
    dropout: float = 0.5

    unused_parameters = ()

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, C) images -> logits (N, K), features (N, hidden)."""
        x = x.reshape(x.shape[0], -1)
        for index in (1, 2, 3):
            make = self.layers.inner_dense_without_act if index == 1 else self.layers.inner_dense
            x = make(self.hidden, name=f"fc{index}")(x, ctx)
            if index == 3 and ctx.train and self.dropout > 0:
                x = self.drop(x)
            x = hard_tanh(BatchNorm(name=f"bn{index}")(x, ctx))
            keep_feature(self, f"after_fc{index}", x)
        return NetworkOutput(logits=self.layers.dense(self.num_classes, name="fc4")(x, ctx), features=x)

    def drop(self, x: jax.Array) -> jax.Array:
        """Inverted dropout with the random stream 'quant'."""
        keep = jax.random.bernoulli(self.make_rng("quant"), 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0.0)
