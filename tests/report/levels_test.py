"""Levels in use are counted from the weights a layer really convolves with."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import QuantConv
from bnn_jax.quantizers import QuantContext, build_weight
from bnn_jax.report.levels import LevelUse, level_counts, levels_in_use
from bnn_jax.stages import IDENTITY, Spec, spec

IMAGE_SHAPE = (4, 4, 3)


class TwoConvolutions(nn.Module):
    """A real-valued and a quantized convolution."""

    weight: Spec

    @nn.compact
    def __call__(self, x, ctx):
        x = QuantConv(8, name="first")(x, ctx)
        return QuantConv(16, weight_quantizer=build_weight(self.weight), name="conv")(x, ctx)


def build(weight):
    network = TwoConvolutions(weight)
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE)), QuantContext())
    return network, variables


def test_counts_cover_every_weight_of_the_quantized_layers() -> None:
    counts = level_counts(*build(spec("dorefa", bits=2)), image_shape=IMAGE_SHAPE)
    assert list(counts) == ["conv"]
    assert counts["conv"].counts.sum() == 3 * 3 * 8 * 16
    assert counts["conv"].levels.tolist() == [-3, -1, 1, 3]
    assert counts["conv"].masked == 0


def test_a_level_no_weight_takes_is_not_in_use() -> None:
    network, variables = build(spec("dorefa", bits=4))
    assert levels_in_use(network, variables, image_shape=IMAGE_SHAPE) == {"conv": LevelUse(levels=16, bits=4)}
    # Weights of one magnitude lie on the two outermost levels only.
    variables["params"]["conv"]["kernel"] = jnp.sign(variables["params"]["conv"]["kernel"])
    assert levels_in_use(network, variables, image_shape=IMAGE_SHAPE) == {"conv": LevelUse(levels=2, bits=1)}


@pytest.mark.parametrize(("apply_mask", "use"), [("before", LevelUse(2, 1)), ("after", LevelUse(3, 2))])
def test_a_mask_behind_the_quantizer_adds_the_level_zero(apply_mask, use) -> None:
    network, variables = build(spec("pruned", inner=spec("dorefa", bits=1), amount=0.25, apply_mask=apply_mask))
    counts = level_counts(network, variables, image_shape=IMAGE_SHAPE)["conv"]
    # A quarter of 16 filters of 3x3x8 weights.
    assert counts.masked == 4 * 72
    assert levels_in_use(network, variables, image_shape=IMAGE_SHAPE) == {"conv": use}
    if apply_mask == "after":
        assert counts.counts[np.flatnonzero(counts.levels == 0)].tolist() == [counts.masked]


def test_patterns_are_counted_once_a_kernel() -> None:
    network, variables = build(spec("codebook", tau=4))
    counts = level_counts(network, variables, image_shape=IMAGE_SHAPE)["conv"]
    assert counts.levels.shape == (16, 9) and counts.counts.shape == (16,)
    assert counts.counts.sum() == 8 * 16
    # Kernels of one kind take one pattern; two kinds need one bit for nine weights.
    kernel = np.ones((3, 3, 8, 16), np.float32)
    kernel[..., :2] = -1
    variables["params"]["conv"]["kernel"] = jnp.asarray(kernel)
    counts = level_counts(network, variables, image_shape=IMAGE_SHAPE)["conv"]
    assert sorted(counts.counts)[-3:] == [0, 16, 8 * 14]
    assert levels_in_use(network, variables, image_shape=IMAGE_SHAPE) == {"conv": LevelUse(levels=2, bits=1 / 9)}


def test_real_valued_layers_have_no_levels() -> None:
    assert levels_in_use(*build(IDENTITY), image_shape=IMAGE_SHAPE) == {}
