"""Residual networks for CIFAR (ResNet-8 to -110, ResNet-18) and ImageNet (ResNet-18, -34)."""

from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax

from bnn_jax.layers.norm import BatchNorm
from bnn_jax.networks.base import Layers, NetworkOutput, global_average_pool, xavier_normal
from bnn_jax.networks.blocks import BLOCKS
from bnn_jax.ops.pooling import max_pool
from bnn_jax.ops.ste import relu6
from bnn_jax.quantizers.base import QuantContext


class ResNet(nn.Module):
    """Stem, stages of residual blocks, classifier.

    Attributes:
      layers: layer factories.
      num_classes: outputs K.
      stage_sizes: blocks per stage; every stage but the first halves the resolution.
      widths: channels per stage.
      block: key in ``blocks.BLOCKS``.
    """

    layers: Layers
    num_classes: int
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    block: str = "release"

    has_blocks: ClassVar[bool] = True

    def blocks(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """All stages, called inside the compact ``__call__``; block b of stage s (from 1) is named ``layer<s>_<b>``."""
        make = self.layers.block(BLOCKS[self.block])
        for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), start=1):
            for index in range(size):
                stride = 2 if stage > 1 and index == 0 else 1
                x = make(width, stride, self.layers, name=f"layer{stage}_{index}")(x, ctx)
        return x

    def classify(self, features: jax.Array, ctx: QuantContext, kernel_init: Callable | None = None) -> NetworkOutput:
        """The classifier ``fc`` on pooled features, called inside the compact ``__call__``."""
        options = {} if kernel_init is None else {"kernel_init": kernel_init}
        logits = self.layers.dense(self.num_classes, name="fc", **options)(features, ctx)
        return NetworkOutput(logits=logits, features=features)

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """Patterns of parameters that get no gradient by construction, so that no weight decay moves them either."""
        if self.block != "checkpoint":
            return ()
        identity_blocks = [
            rf"layer{stage}_{index}"
            for stage, size in enumerate(self.stage_sizes, start=1)
            for index in range(size)
            if index > 0 or stage == 1
        ]
        return tuple(f"^{name}/bn1/" for name in identity_blocks)


class CifarResNet(ResNet):
    """ResNet for 32x32 images: plain 3x3 stem; BatchNorm, ReLU6 and average pooling before the classifier.

    Reference: ASBQ specification, section 2.6; He et al. 2016 (arXiv 1603.05027).
    """

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) normalised images -> logits (N, K), features (N, widths[-1])."""
        x = self.layers.first_conv(self.widths[0], name="conv1")(x, ctx)
        x = self.blocks(x, ctx)
        return self.classify(global_average_pool(relu6(BatchNorm(name="bn")(x, ctx))), ctx)


class ImageNetResNet(ResNet):
    """ResNet for 224x224 images: 7x7 stem, ReLU6, BatchNorm, max pooling; no BatchNorm after the last block.

    Reference: ASBQ specification, section 2.6; release: Luadoo/ASBQ: quantization/resnet_imagenet.py.
    """

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) normalised images -> logits (N, K), features (N, widths[-1])."""
        conv1 = self.layers.first_conv(
            self.widths[0],
            kernel_size=(7, 7),
            strides=(2, 2),
            padding=((3, 3), (3, 3)),
            name="conv1",
        )
        x = BatchNorm(name="bn1")(relu6(conv1(x, ctx)), ctx)
        x = max_pool(x, size=3, stride=2, padding=1)
        return self.classify(global_average_pool(self.blocks(x, ctx)), ctx, kernel_init=xavier_normal)
