"""Costs of the published networks by value, and the rules they are counted by."""

import json
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import networks
from bnn_jax.layers import BatchNorm, QuantConv, QuantDense
from bnn_jax.quantizers import QuantContext, build_act, build_weight
from bnn_jax.report.costs import Complexity, LevelUse, complexity, levels_in_use
from bnn_jax.stages import IDENTITY, QuantSpec, Spec, spec

CIFAR = (32, 32, 3)
IMAGENET = (224, 224, 3)


def low_bit(weight_bits: int, act_bits: int) -> QuantSpec:
    return QuantSpec(weight=spec("dorefa", bits=weight_bits), act=spec("dorefa", bits=act_bits))


def of_network(name: str, image_shape=CIFAR, num_classes=10, quant=None, **options) -> Complexity:
    network = networks.build(spec(name, **options), quant or low_bit(4, 2), num_classes=num_classes)
    return complexity(network, image_shape)


def test_resnet20_by_value() -> None:
    cost = of_network("resnet20")
    quantized = [layer for layer in cost.layers if layer.quantized]
    by_reason = {
        reason: sum(layer.parameters for layer in cost.layers if layer.full_precision_because == reason)
        for reason in ("first layer", "shortcut", "classifier", "batch norm")
    }
    macs = {reason: sum(x.macs for x in cost.layers if x.full_precision_because == reason) for reason in by_reason}
    assert len(quantized) == 18
    assert sum(layer.weights for layer in quantized) == 267_264
    assert by_reason == {"first layer": 432, "shortcut": 512 + 2048, "classifier": 650, "batch norm": 1568}
    assert cost.total.parameters == 267_264 + 432 + 2560 + 650 + 1568
    assert sum(layer.macs for layer in quantized) == 40_108_032
    assert macs == {"first layer": 442_368, "shortcut": 262_144, "classifier": 640, "batch norm": 0}


def test_resnet20_bits_follow_the_definitions() -> None:
    total = of_network("resnet20", quant=low_bit(4, 2)).total
    # BatchNorm stores scale, bias, running mean and running variance: twice its parameters. A scale a quantized layer.
    floats = 432 + 2560 + 650 + 2 * 1568 + 18
    assert total.quantized_bits == 4 * 267_264
    assert total.full_precision_bits == 32 * floats
    assert total.stored_bits == total.quantized_bits + total.codebook_bits + total.full_precision_bits
    assert total.bit_operations == 4 * 2 * 40_108_032


def test_imagenet_resnet18_by_value() -> None:
    layers = of_network("resnet18", IMAGENET, 1000).layers
    assert sum(layer.quantized for layer in layers) == 16
    assert sum(layer.weights for layer in layers if layer.quantized) == 10_985_472
    assert sum(layer.weights for layer in layers if layer.full_precision_because == "shortcut") == 172_032
    assert sum(layer.kind == "batch_norm" for layer in layers) == 20
    assert next(layer for layer in layers if layer.path == "layer4_0/conv1").output_shape == (7, 7, 512)


@pytest.mark.parametrize(
    ("name", "image_shape", "num_classes", "parameters"),
    [
        ("resnet14", CIFAR, 10, 175_258),
        ("resnet26", CIFAR, 10, 369_690),
        ("resnet56", CIFAR, 10, 855_770),
        ("vgg_small", CIFAR, 10, 4_660_106),
        ("resnet34", IMAGENET, 1000, 21_796_776),
    ],
)
def test_parameters_of_the_published_networks(name, image_shape, num_classes, parameters) -> None:
    assert of_network(name, image_shape, num_classes).total.parameters == parameters


BINARY = QuantSpec(weight=spec("irnet"), act=spec("irnet"))


# Columns: parameters, quantized layers, their weights, their MACs, MACs of the others (SKD-BNN specification, section
# 5; the last row follows from the sizes of the layers). The specification counts the shortcuts of both ResNet-18 twice,
# 14,357,504 and 157,061,120: in training the real stream runs them a second time, for an image they are run once.
SHORTCUTS_OF_THE_REAL_STREAM = {"hardtanh_resnet18_cifar": 14_357_504, "hardtanh_resnet18": 157_061_120}


@pytest.mark.parametrize(
    ("name", "image_shape", "num_classes", "expected"),
    [
        ("hardtanh_resnet20", CIFAR, 10, (269_850, 18, 267_264, 40_108_032, 443_008)),
        ("hardtanh_vgg_small", CIFAR, 10, (4_660_106, 5, 4_571_136, 603_979_776, 3_620_864)),
        ("hardtanh_resnet18_cifar", CIFAR, 10, (11_174_986, 16, 10_985_472, 547_356_672, 8_066_048)),
        ("hardtanh_resnet18", IMAGENET, 1000, (11_690_536, 16, 10_985_472, 1_676_279_808, 137_793_536)),
        ("hardtanh_mlp", (28, 28, 1), 10, (10_033_162, 3, 9_994_240, 9_994_240, 20_480)),
    ],
)
def test_binary_networks_by_value(name, image_shape, num_classes, expected) -> None:
    cost = of_network(name, image_shape, num_classes, quant=BINARY)
    quantized, others = ([x for x in cost.layers if x.quantized == kind] for kind in (True, False))
    sums = (sum(x.weights for x in quantized), sum(x.macs for x in quantized), sum(x.macs for x in others))
    assert (cost.total.parameters, len(quantized), *sums) == expected
    assert cost.total.quantized_bits == expected[2]
    shortcuts = sum(layer.macs for layer in others if layer.full_precision_because == "shortcut")
    assert sums[2] + shortcuts == SHORTCUTS_OF_THE_REAL_STREAM.get(name, sums[2])


@pytest.mark.parametrize(
    ("name", "image_shape", "parameters"),
    [
        ("hardtanh_resnet20", CIFAR, 2_586),
        ("hardtanh_vgg_small", CIFAR, 88_970),
        ("hardtanh_resnet18_cifar", CIFAR, 189_514),
        ("hardtanh_resnet18", IMAGENET, 705_064),
    ],
)
def test_full_precision_parameters_of_the_binary_networks(name, image_shape, parameters) -> None:
    cost = of_network(name, image_shape, 1000 if image_shape == IMAGENET else 10, quant=BINARY)
    assert sum(layer.parameters for layer in cost.layers if not layer.quantized) == parameters


def test_binary_layers_multiply_bits() -> None:
    layers = {layer.path: layer for layer in of_network("hardtanh_mlp", (28, 28, 1), quant=BINARY).layers}
    # The first layer of the MLP reads the pixels as they are.
    assert [layers[f"fc{index}"].activation_bits for index in (1, 2, 3)] == [32, 1, 1]
    resnet = of_network("hardtanh_resnet20", quant=BINARY)
    assert {layer.activation_bits for layer in resnet.layers if layer.quantized} == {1}
    assert resnet.total.bit_operations == 40_108_032


def test_without_quantizers_everything_is_stored_in_full_precision() -> None:
    cost = of_network("resnet8", quant=QuantSpec())
    statistics = sum(layer.parameters for layer in cost.layers if layer.kind == "batch_norm")
    assert cost.total.quantized_bits == cost.total.bit_operations == 0
    assert cost.total.full_precision_bits == 32 * (cost.total.parameters + statistics)
    reasons = {layer.full_precision_because for layer in cost.layers if layer.path.endswith("/conv2")}
    assert reasons == {"no quantizer"}


def test_a_mask_does_not_change_the_size() -> None:
    pruned = QuantSpec(weight=spec("pruned", inner=spec("dorefa", bits=4), amount=0.5), act=spec("dorefa", bits=2))
    assert of_network("resnet8", quant=pruned) == of_network("resnet8", quant=low_bit(4, 2))


@pytest.mark.parametrize(
    ("block", "conv1", "conv2", "shortcut"),
    # checkpoint: conv1 reads the sum, the shortcut the quantized values; imagenet: BatchNorm is behind the quantizer.
    [("release", 2, 2, 32), ("checkpoint", 32, 2, 2), ("imagenet", 32, 32, 32)],
)
def test_activation_bits_are_those_the_layer_reads(block, conv1, conv2, shortcut) -> None:
    bits = {layer.path: layer.activation_bits for layer in of_network("resnet8", block=block).layers}
    found = [bits[f"layer2_0/{name}"] for name in ("conv1", "conv2", "downsample_conv")]
    assert found == [conv1, conv2, shortcut]


def test_activation_bits_pass_through_moves_of_values() -> None:
    # VGG-Small's classifier reads the last quantizer's values, transposed and flattened.
    layers = {layer.path: layer for layer in of_network("vgg_small").layers}
    assert layers["fc"].activation_bits == 2
    assert layers["conv0"].activation_bits == 32


class Odd(nn.Module):
    """A grouped convolution used twice behind max pooling of quantized values, and a parameter of its own."""

    second_input: Literal["the same", "a sum"] = "the same"

    @nn.compact
    def __call__(self, x, ctx):
        x = build_act(spec("dorefa", bits=3))(name="act")(x, ctx)
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        conv = QuantConv(4, groups=2, use_bias=True, weight_quantizer=build_weight(spec("dorefa", bits=2)), name="conv")
        y = conv(x, ctx)
        y = conv(x if self.second_input == "the same" else x + y, ctx)
        y = BatchNorm(name="bn")(y, ctx) * self.param("gain", nn.initializers.ones, (1, 1, 1, 1))
        return QuantDense(3, name="fc")(jnp.mean(y, axis=(1, 2)), ctx)


def test_a_layer_called_twice_stores_once_and_computes_twice() -> None:
    layers = {layer.path: layer for layer in complexity(Odd(), (8, 8, 4)).layers}
    conv = layers["conv"]
    assert conv.kernel_shape == (3, 3, 2, 4)
    assert conv.output_shape == (4, 4, 4)
    assert (conv.weights, conv.parameters) == (72, 76)
    assert conv.macs == 2 * (4 * 4 * 4) * (3 * 3 * 2)
    # Stored in full precision: the bias and the scale of the layer.
    assert (conv.quantized_bits, conv.full_precision_bits) == (2 * 72, 32 * (4 + 1))
    assert conv.activation_bits == 3
    assert conv.bit_operations == 2 * 3 * conv.macs


def test_the_widest_input_of_a_layer_called_twice_counts() -> None:
    layers = {layer.path: layer for layer in complexity(Odd(second_input="a sum"), (8, 8, 4)).layers}
    assert layers["conv"].activation_bits == 32


# ---- sub-bit weights


def sub_bit(tau: int) -> QuantSpec:
    return QuantSpec(weight=spec("codebook", tau=tau), act=spec("sign"))


@pytest.mark.parametrize("tau", [4, 5, 9])
def test_a_layer_of_codebook_kernels_by_value(tau) -> None:
    layers = {x.path: x for x in of_network("standard_resnet18_cifar", quant=sub_bit(tau)).layers}
    conv = layers["layer4_0/conv1"]
    kernels, positions = 256 * 512, 4 * 4
    # With all 512 patterns nothing is shared, and an index is the pattern itself.
    per_position = 256 * (9 * 2**tau + 512 / 2) if tau < 9 else 9 * kernels
    assert (conv.weights, conv.weight_bits, conv.operation_bits) == (9 * kernels, tau / 9, 1)
    assert conv.parameters == 9 * kernels + 9 * 2**tau
    assert conv.quantized_bits == tau * kernels
    assert conv.codebook_bits == (9 * 2**tau if tau < 9 else 0)
    # One scale a filter; the codebook's real values are not stored.
    assert conv.full_precision_bits == 32 * 512
    assert (conv.macs, conv.shared_macs) == (positions * 9 * kernels, positions * per_position)
    assert conv.bit_operations == positions * per_position


def test_patterns_are_shared_where_they_are_fewer_than_the_filters() -> None:
    layers = {x.path: x for x in of_network("standard_resnet18_cifar", quant=sub_bit(6)).layers}
    narrow, wide = layers["layer1_0/conv1"], layers["layer2_0/conv1"]
    assert (narrow.kernel_shape[-1], wide.kernel_shape[-1]) == (64, 128)
    assert narrow.bit_operations == narrow.macs
    assert wide.bit_operations == 16 * 16 * 64 * (9 * 64 + 128 // 2) < wide.macs


def test_a_mask_around_a_codebook_changes_no_cost() -> None:
    pruned = QuantSpec(weight=spec("pruned", inner=spec("codebook", tau=4), amount=0.5), act=spec("sign"))
    assert of_network("standard_resnet20", quant=pruned) == of_network("standard_resnet20", quant=sub_bit(4))


def test_weights_of_one_bit_at_real_activations_multiply_32_bits() -> None:
    cost = of_network("standard_resnet20", quant=QuantSpec(weight=spec("codebook", tau=9)))
    assert cost.total.bit_operations == 32 * 40_108_032


@pytest.mark.parametrize(("quantizer", "scales"), [("dorefa", 1), ("irnet", 20), ("sign", 0), ("codebook", 20)])
def test_scales_that_follow_from_the_weights_are_stored(quantizer, scales) -> None:
    options = {"bits": 1} if quantizer == "dorefa" else {}

    class One(nn.Module):
        @nn.compact
        def __call__(self, x, ctx):
            return QuantConv(20, weight_quantizer=build_weight(spec(quantizer, **options)), name="conv")(x, ctx)

    (layer,) = complexity(One(), (8, 8, 4)).layers
    assert layer.full_precision_bits == 32 * scales


def test_a_parameter_outside_any_layer_is_counted() -> None:
    network = Odd()
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)), QuantContext())
    cost = complexity(network, (8, 8, 4))
    assert cost.total.parameters == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert next(layer for layer in cost.layers if layer.kind == "Odd").parameters == 1


def test_json_holds_the_layers_and_their_sums() -> None:
    cost = of_network("resnet8")
    content = json.loads(json.dumps(cost.to_json()))
    assert set(content["total"]) == {
        "parameters",
        "quantized_bits",
        "codebook_bits",
        "full_precision_bits",
        "stored_bits",
        "macs",
        "bit_operations",
    }
    for name, value in content["total"].items():
        assert value == sum(layer[name] for layer in content["layers"])


# ---- levels in use


class TwoConvolutions(nn.Module):
    """A real-valued and a quantized convolution."""

    weight: Spec

    @nn.compact
    def __call__(self, x, ctx):
        x = QuantConv(8, name="first")(x, ctx)
        return QuantConv(16, weight_quantizer=build_weight(self.weight), name="conv")(x, ctx)


def levels_of(weight: Spec, **kernels: Any) -> dict[str, LevelUse]:
    """Levels in use with the initial weights, or with other ones in a layer."""
    network = TwoConvolutions(weight)
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), QuantContext())
    for layer, kernel in kernels.items():
        variables["params"][layer]["kernel"] = jnp.asarray(kernel)
    return levels_in_use(network, variables, (4, 4, 3))


def test_a_level_no_weight_takes_is_not_in_use() -> None:
    assert levels_of(spec("dorefa", bits=4)) == {"conv": LevelUse(levels=16, bits=4)}
    # Weights of one magnitude lie on the two outermost levels only.
    signs = np.sign(np.random.RandomState(0).normal(size=(3, 3, 8, 16)))
    assert levels_of(spec("dorefa", bits=4), conv=signs) == {"conv": LevelUse(levels=2, bits=1)}


@pytest.mark.parametrize(("apply_mask", "use"), [("before", LevelUse(2, 1)), ("after", LevelUse(3, 2))])
def test_a_mask_behind_the_quantizer_adds_the_level_zero(apply_mask, use) -> None:
    assert levels_of(spec("pruned", inner=spec("dorefa", bits=1), amount=0.25, apply_mask=apply_mask)) == {"conv": use}


def test_patterns_are_counted_once_a_kernel() -> None:
    # Kernels of one kind take one pattern; two kinds need one bit for nine weights.
    kernel = np.ones((3, 3, 8, 16), np.float32)
    kernel[..., :2] = -1
    assert levels_of(spec("codebook", tau=4), conv=kernel) == {"conv": LevelUse(levels=2, bits=1 / 9)}


def test_real_valued_layers_have_no_levels() -> None:
    assert levels_of(IDENTITY) == {}


# ---- BatchNorm with branches


def test_batch_norm_with_branches_is_counted_as_batch_norm() -> None:
    quant = QuantSpec(weight=spec("lsq", bits=2), act=spec("lsq", bits=2), searched=spec("branch_clip", bits=2))
    norms = [x for x in of_network("basq_resnet8_cifar", quant=quant).layers if "norm" in x.path or "bn" in x.path]
    assert norms
    assert {(layer.kind, layer.full_precision_because) for layer in norms} == {("batch_norm", "batch norm")}
