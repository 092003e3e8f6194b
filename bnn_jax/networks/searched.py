"""Networks whose activation quantizers have branches to choose from: MobileNet-v1, -v2 and ResNets in BASQ's form.

Every convolution stands between two BatchNorms, has a full-precision shortcut of its own, and a BatchNorm behind the
sum. 3x3 convolutions are searched: everything about them but the convolution's own weights exists once per branch. 1x1
convolutions are not.

Released by the authors: MobileNet-v2 for ImageNet, at 2 bits. By analogy, following the paper's text where it says
something: MobileNet-v1 (the same units without expansion and without a shortcut around a block), the ResNets (every 3x3
convolution is a searched unit, so there are no 1x1 shortcut convolutions), and the forms for 32x32 images (stem without
stride; MobileNet-v2 with one stride less).
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnn_jax.layers.norm import BatchNorm
from bnn_jax.layers.shortcut import flexible_shortcut
from bnn_jax.networks.base import Layers, NetworkOutput, global_average_pool, keep_feature
from bnn_jax.ops.pooling import max_pool
from bnn_jax.quantizers.base import QuantContext

# (expansion t, output channels c, blocks n, stride s of the first block).
Rows = tuple[tuple[int, int, int, int], ...]


class SearchedUnit(nn.Module):
    """A 3x3 convolution whose clip value, BatchNorms and their statistics exist once per branch.

    Forward, branch j: ``v = relu(norm_out_j(conv(quantize_j(norm_in_j(x)))))``, ``y = norm_last_j(v + shortcut(x))``.

    Attributes:
      features: output channels.
      stride: of the convolution; the shortcut averages.
      index: place in ``ctx.choice``.
      branches: number of branches.
      layers: layer factories.
      depthwise: whether every channel is convolved on its own.

    Reference: BASQ, Kim et al. 2022 (ECCV), sections 3.2 and 3.4; release: HanByulKim/BASQ: mbv2_supernet.py.
    """

    features: int
    stride: int
    index: int
    branches: int
    layers: Layers
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H/stride, W/stride, features)."""
        norm = functools.partial(BatchNorm, branches=self.branches, index=self.index)
        conv = self.layers.searched_conv(
            self.features,
            index=self.index,
            branches=self.branches,
            strides=(self.stride, self.stride),
            groups=x.shape[-1] if self.depthwise else 1,
            name="conv",
        )
        v = nn.relu(norm(name="norm_out")(conv(norm(name="norm_in")(x, ctx), ctx), ctx))
        return norm(name="norm_last")(v + flexible_shortcut(x, self.features, stride=self.stride), ctx)


class PointwiseUnit(nn.Module):
    """A 1x1 convolution with one activation quantizer, not searched.

    Forward: ``v = relu(norm_out(conv(quantize(norm_in(x)))))``, ``y = norm_last(v + shortcut(x))``.

    Attributes:
      features: output channels.
      layers: layer factories.

    Reference: BASQ, Kim et al. 2022 (ECCV), section 3.4; release: HanByulKim/BASQ: mbv2_supernet.py.
    """

    features: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H, W, features)."""
        conv = self.layers.conv(self.features, kernel_size=(1, 1), padding=((0, 0), (0, 0)), name="conv")
        v = nn.relu(BatchNorm(name="norm_out")(conv(BatchNorm(name="norm_in")(x, ctx), ctx), ctx))
        return BatchNorm(name="norm_last")(v + flexible_shortcut(x, self.features), ctx)


class SearchedMobileBlock(nn.Module):
    """Expansion (unless ``expansion`` is 1), searched depthwise unit, projection; the input is added where it fits.

    Attributes:
      features: output channels.
      stride: of the depthwise convolution.
      expansion: channels of the depthwise unit in units of the input's.
      index: place in ``ctx.choice``.
      branches: number of branches.
      layers: layer factories.
      block_shortcut: whether the input is added to an output of its shape.

    Reference: release: HanByulKim/BASQ: mbv2_supernet.py.
    """

    features: int
    stride: int
    expansion: int
    index: int
    branches: int
    layers: Layers
    block_shortcut: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """(N, H, W, C) -> (N, H/stride, W/stride, features)."""
        hidden = self.expansion * x.shape[-1]
        a = x if self.expansion == 1 else PointwiseUnit(hidden, self.layers, name="expand")(x, ctx)
        depthwise = SearchedUnit(
            hidden, self.stride, self.index, self.branches, self.layers, depthwise=True, name="depthwise"
        )
        d = depthwise(a, ctx)
        keep_feature(self, "after_depthwise", d)
        e = PointwiseUnit(self.features, self.layers, name="project")(d, ctx)
        keep_feature(self, "after_project", e)
        return e + x if self.block_shortcut and self.stride == 1 and x.shape[-1] == self.features else e


class SearchedNetwork(nn.Module):
    """Base of the networks: what is searched, stem and classifier.

    Attributes:
      layers: layer factories.
      num_classes: outputs K.
      branches: branches of every searched layer; 1 gives an ordinary network without branch axes.
      stem_width: channels of the first convolution.
      stem_stride: its stride.
      dropout: share of the classifier's inputs set to zero in training.
    """

    layers: Layers
    num_classes: int
    branches: int = 7
    stem_width: int = 32
    stem_stride: int = 2
    dropout: float = 0.0

    unused_parameters = ()
    has_blocks = True

    @property
    def branch_patterns(self) -> tuple[str, ...]:
        """For each place in ``ctx.choice`` a pattern of the paths of the variables with a leading branch axis."""
        return tuple(rf"^{unit}/(norm_\w+/|conv/act_quantizer/)" for unit in self.searched_units)

    @property
    def searched_units(self) -> tuple[str, ...]:
        """Paths of the searched units, in the order of ``ctx.choice``."""
        raise NotImplementedError

    def stem(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """First convolution, BatchNorm and ReLU, called inside the compact ``__call__``."""
        strides = (self.stem_stride, self.stem_stride)
        x = self.layers.first_conv(self.stem_width, strides=strides, name="stem_conv")(x, ctx)
        return nn.relu(BatchNorm(name="stem_norm")(x, ctx))

    def classify(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """Average pooling, dropout and the classifier ``fc``, called inside the compact ``__call__``."""
        features = x = global_average_pool(x)
        if ctx.train and self.dropout > 0:
            keep = jax.random.bernoulli(self.make_rng("quant"), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0.0)
        return NetworkOutput(logits=self.layers.dense(self.num_classes, name="fc")(x, ctx), features=features)


class SearchedMobileNet(SearchedNetwork):
    """MobileNet-v1 or -v2: one searched layer, the depthwise convolution, in each block.

    Attributes:
      rows: (expansion, channels, blocks, stride of the first block).
      head_width: channels of the 1x1 unit before the classifier; 0 for none.
      block_shortcut: whether a block's input is added to an output of its shape.

    Reference: release: HanByulKim/BASQ: mbv2_supernet.py (MobileNet-v2).
    """

    rows: Rows = ()
    head_width: int = 0
    block_shortcut: bool = True

    @property
    def searched_units(self) -> tuple[str, ...]:
        return tuple(f"block_{number}/depthwise" for number in range(1, sum(row[2] for row in self.rows) + 1))

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) normalised images -> logits (N, K), features (N, head_width or the last row's channels)."""
        make = self.layers.block(SearchedMobileBlock)
        x, index = self.stem(x, ctx), 0
        for expansion, width, blocks, first_stride in self.rows:
            for position in range(blocks):
                block = make(
                    width,
                    first_stride if position == 0 else 1,
                    expansion,
                    index,
                    self.branches,
                    self.layers,
                    self.block_shortcut,
                    name=f"block_{index + 1}",
                )
                x, index = block(x, ctx), index + 1
        if self.head_width:
            x = PointwiseUnit(self.head_width, self.layers, name="head")(x, ctx)
        return self.classify(x, ctx)


class SearchedResNet(SearchedNetwork):
    """ResNet of blocks of two searched 3x3 units; the block's input is added where its shape fits. By analogy.

    Attributes:
      stage_sizes: blocks per stage; every stage but the first halves the resolution.
      widths: channels per stage.
      imagenet_stem: 7x7 stem with stride 2 and max pooling (224x224 images); else 3x3.
    """

    stage_sizes: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    imagenet_stem: bool = False

    @property
    def block_names(self) -> tuple[tuple[str, int, int], ...]:
        """Name, channels and stride of every block."""
        return tuple(
            (f"layer{stage}_{index}", width, 2 if stage > 1 and index == 0 else 1)
            for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), start=1)
            for index in range(size)
        )

    @property
    def searched_units(self) -> tuple[str, ...]:
        return tuple(f"{name}_unit{unit}" for name, _, _ in self.block_names for unit in (1, 2))

    @nn.compact
    def __call__(self, x: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """(N, H, W, 3) normalised images -> logits (N, K), features (N, widths[-1])."""
        make = self.layers.block(SearchedUnit)
        x = self.imagenet_start(x, ctx) if self.imagenet_stem else self.stem(x, ctx)
        index = 0
        for name, width, stride in self.block_names:
            unit = functools.partial(make, width, branches=self.branches, layers=self.layers)
            a = unit(stride=stride, index=index, name=f"{name}_unit1")(x, ctx)
            e = unit(stride=1, index=index + 1, name=f"{name}_unit2")(a, ctx)
            keep_feature(self, f"after_{name}", e)
            x, index = e + x if x.shape == e.shape else e, index + 2
        return self.classify(x, ctx)

    def imagenet_start(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """7x7 convolution, BatchNorm, ReLU, max pooling, called inside the compact ``__call__``."""
        stem: dict[str, Any] = {"kernel_size": (7, 7), "strides": (2, 2), "padding": ((3, 3), (3, 3))}
        x = self.layers.first_conv(self.stem_width, name="stem_conv", **stem)(x, ctx)
        x = nn.relu(BatchNorm(name="stem_norm")(x, ctx))
        return max_pool(x, size=3, stride=2, padding=1)


def extract(network: Any, variables: Mapping[str, Any], path: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """One path of a supernet as an ordinary network: same logits, no branch axes, nothing left of other branches.

    Args:
      network: the supernet.
      variables: its variables.
      path: branch of each searched layer.

    Returns:
      The network with one branch, and its variables.

    Raises:
      ValueError: the path does not fit the network.
    """
    genes = len(network.branch_patterns)
    if len(path) != genes or not all(0 <= branch < network.branches for branch in path):
        raise ValueError(f"path {tuple(path)!r}: accepted are {genes} branches of 0 to {network.branches - 1}")
    if network.branches == 1:
        return network, dict(variables)

    def row(key_path: Sequence[Any], leaf: jax.Array) -> jax.Array:
        # The first key is the collection.
        name = "/".join(key.key for key in key_path[1:])
        genes = (gene for gene, pattern in enumerate(network.branch_patterns) if re.search(pattern, name))
        gene = next(genes, None)
        return leaf if gene is None else leaf[path[gene]]

    return network.clone(branches=1), jax.tree_util.tree_map_with_path(row, dict(variables))


_V2_ROWS: Rows = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_V1_ROWS: Rows = (
    (1, 64, 1, 1),
    (1, 128, 1, 2),
    (1, 128, 1, 1),
    (1, 256, 1, 2),
    (1, 256, 1, 1),
    (1, 512, 1, 2),
    (1, 512, 5, 1),
    (1, 1024, 1, 2),
    (1, 1024, 1, 1),
)

SEARCHED_NETWORKS: dict[str, Any] = {
    "basq_mobilenet_v2": functools.partial(SearchedMobileNet, rows=_V2_ROWS, head_width=1280, dropout=0.2),
    "basq_mobilenet_v1": functools.partial(SearchedMobileNet, rows=_V1_ROWS, block_shortcut=False),
    "basq_mobilenet_v2_cifar": functools.partial(
        SearchedMobileNet,
        rows=(_V2_ROWS[0], (6, 24, 2, 1), *_V2_ROWS[2:]),
        head_width=1280,
        dropout=0.2,
        stem_stride=1,
    ),
    "basq_resnet18": functools.partial(
        SearchedResNet, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512), stem_width=64, imagenet_stem=True
    ),
    # For trials: six searched layers.
    "basq_resnet8_cifar": functools.partial(
        SearchedResNet, stage_sizes=(1, 1, 1), widths=(16, 32, 64), stem_width=16, stem_stride=1
    ),
    "basq_resnet20_cifar": functools.partial(
        SearchedResNet, stage_sizes=(3, 3, 3), widths=(16, 32, 64), stem_width=16, stem_stride=1
    ),
}
