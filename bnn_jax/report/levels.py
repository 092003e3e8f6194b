"""Which levels the weights of trained quantized layers really take: the size a table of levels in use would need."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import numpy as np

from bnn_jax.quantizers.base import Encoded
from bnn_jax.storage.weights import encoded_weights


@dataclasses.dataclass(frozen=True)
class LevelCounts:
    """How often the weights of one layer take each level.

    Attributes:
      levels: (L,) float32, increasing, before the layer's scale; or (L, n), patterns of n weights each.
      counts: (L,) int, number of weights on each level, or of patterns; 0 for a level not in use.
      masked: number of weights a pruning mask has taken out; they are counted on the level they ended on.
    """

    levels: np.ndarray
    counts: np.ndarray
    masked: int


class LevelUse(NamedTuple):
    """Levels of one layer that at least one weight takes.

    Attributes:
      levels: their number; where a level is a pattern of n weights, of patterns.
      bits: ceil(log2(levels)), the bits of an index into them, per weight: divided by n for patterns.
    """

    levels: int
    bits: float


def level_counts(
    network: nn.Module, variables: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> dict[str, LevelCounts]:
    """Counts the weights on each level, layer by layer, by the weight quantizers' ``encode``.

    The network is traced, not run: only the weights are computed with.

    Args:
      network: (images, QuantContext) -> NetworkOutput.
      variables: trained variables of the network (params, batch_stats, quant_state).
      image_shape: (H, W, C) of the images it reads.

    Returns:
      Counts by path of the layer ('layer1_0/conv1'), in the order of the calls, without layers of real-valued weights.
    """
    masks: dict[str, Any] = flax.traverse_util.flatten_dict(variables.get("quant_state", {}), sep="/")
    return {
        layer: _count(encoded, masks.get(f"{layer}/weight_quantizer/mask"))
        for layer, encoded in encoded_weights(network, variables, image_shape).items()
    }


def _count(encoded: Encoded, mask: Any) -> LevelCounts:
    """Counts of a layer's levels; ``mask`` is its pruning mask or None."""
    counts = np.bincount(np.asarray(encoded.indices).ravel(), minlength=len(encoded.levels))
    masked = 0 if mask is None else int(np.sum(np.asarray(mask) == 0))
    return LevelCounts(levels=np.asarray(encoded.levels), counts=counts, masked=masked)


def levels_in_use(
    network: nn.Module, variables: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> dict[str, LevelUse]:
    """Number of levels in use, and the bits of an index into them, by path of the layer.

    A nominal k-bit layer can need fewer bits (levels that no weight takes) or more (a pruning mask adds the level 0;
    the 1-bit rule of the ASBQ release gives integer multiples of a scale).

    Args:
      network: (images, QuantContext) -> NetworkOutput.
      variables: trained variables of the network.
      image_shape: (H, W, C) of the images it reads.
    """
    return {path: _use(counts) for path, counts in level_counts(network, variables, image_shape).items()}


def _use(counts: LevelCounts) -> LevelUse:
    levels = int(np.count_nonzero(counts.counts))
    bits, weights_per_index = (levels - 1).bit_length(), math.prod(counts.levels.shape[1:])
    return LevelUse(levels=levels, bits=bits if weights_per_index == 1 else bits / weights_per_index)
