"""The ordinary ReLU networks, written out once more in NumPy; counts are in battery_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import networks
from bnn_jax.layers.conv import fan_in_uniform
from bnn_jax.networks.base import he_fan_in_normal, he_fan_out_normal
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import QuantSpec, spec
from tests.networks.battery_test import initialisers_of
from tests.networks.hard_tanh_test import TOLERANCE, Reference, build, drawn_variables, features_of, images_of


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


class ReluReference(Reference):
    """Blocks with ReLU in evaluation mode, in float64."""

    def basic(self, x: np.ndarray, name: str, *, stride: int, padded: bool) -> list[np.ndarray]:
        """Both activations of a basic block."""
        h = relu(self.norm(self.conv(x, name, "conv1", stride=stride), name, "bn1"))
        z = self.norm(self.conv(h, name, "conv2"), name, "bn2")
        return [h, relu(z + self.shortcut(x, name, stride=stride, width=z.shape[-1], padded=padded))]

    def bottleneck(self, x: np.ndarray, name: str, *, stride: int) -> list[np.ndarray]:
        """The three activations of a bottleneck block."""
        h1 = relu(self.norm(self.conv(x, name, "conv1", pad=0), name, "bn1"))
        h2 = relu(self.norm(self.conv(h1, name, "conv2", stride=stride), name, "bn2"))
        z = self.norm(self.conv(h2, name, "conv3", pad=0), name, "bn3")
        return [h1, h2, relu(z + self.shortcut(x, name, stride=stride, width=z.shape[-1], padded=False))]


@pytest.mark.parametrize(
    ("name", "padded"), [("standard_resnet20", True), ("standard_resnet18_cifar", False)], ids=["padded", "projected"]
)
def test_cifar_resnets_activate_behind_the_sum(name: str, padded: bool) -> None:
    network = build(spec(name, stage_sizes=(1, 2), widths=(4, 8)))
    variables, images = drawn_variables(network), images_of(2)
    output, collections = features_of(network, variables, images)
    reference = ReluReference(variables)
    x, kept = relu(reference.norm(reference.conv(np.asarray(images), "conv1"), "bn1")), []
    for block, stride in (("layer1_0", 1), ("layer2_0", 2), ("layer2_1", 1)):
        kept += reference.basic(x, block, stride=stride, padded=padded)
        x = kept[-1]
    for feature, expected in zip(jax.tree.leaves(collections["block_features"]), kept, strict=True):
        np.testing.assert_allclose(feature, expected, **TOLERANCE)
    np.testing.assert_allclose(output.features, x.mean(axis=(1, 2)), **TOLERANCE)
    np.testing.assert_allclose(output.logits, reference.dense(x.mean(axis=(1, 2)), "fc"), **TOLERANCE)


@pytest.mark.parametrize("name", ["standard_resnet18", "standard_resnet50"])
def test_imagenet_resnets_pool_their_stem(name: str) -> None:
    network = build(spec(name, stage_sizes=(1, 2), widths=(4, 8)))
    variables, images = drawn_variables(network, (16, 16, 3)), images_of(2, side=16)
    output, collections = features_of(network, variables, images)
    reference = ReluReference(variables)
    stem = relu(reference.norm(reference.conv(np.asarray(images), "conv1", stride=2, pad=3), "bn1"))
    padded = np.pad(stem, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    x, kept = np.max([padded[:, i : i + 8 : 2, j : j + 8 : 2] for i in range(3) for j in range(3)], axis=0), []
    for block, stride in (("layer1_0", 1), ("layer2_0", 2), ("layer2_1", 1)):
        if name == "standard_resnet50":
            kept += reference.bottleneck(x, block, stride=stride)
        else:
            kept += reference.basic(x, block, stride=stride, padded=False)
        x = kept[-1]
    for feature, expected in zip(jax.tree.leaves(collections["block_features"]), kept, strict=True):
        np.testing.assert_allclose(feature, expected, **TOLERANCE)
    np.testing.assert_allclose(output.logits, reference.dense(x.mean(axis=(1, 2)), "fc"), **TOLERANCE)


def test_vgg_pools_before_its_norm_and_flattens_channel_by_channel() -> None:
    network = build(spec("standard_vgg_small", widths=(4, 4, 6, 6, 8, 8)))
    variables, images = drawn_variables(network, (16, 16, 3)), images_of(2, side=16)
    output, _ = features_of(network, variables, images)
    reference, x = ReluReference(variables), np.asarray(images, np.float64)
    for index in range(6):
        x = reference.conv(x, f"conv{index}")
        if index in (1, 3, 5):
            x = np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)
        x = relu(reference.norm(x, f"bn{index}"))
    flat = x.transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(output.features, flat, **TOLERANCE)
    np.testing.assert_allclose(output.logits, reference.dense(flat, "fc"), **TOLERANCE)


def test_the_gradient_at_exactly_zero_is_zero() -> None:
    network = build(spec("standard_resnet20", stage_sizes=(1,), widths=(4,)))
    variables, images = drawn_variables(network), images_of(2)
    # Without scale and bias every ReLU reads exact zeros, and the sum behind a block is what the stem hands on.
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    params["bn1"] = jax.tree.map(np.zeros_like, params["bn1"])

    def loss(bias: jax.Array) -> jax.Array:
        changed = {**params, "bn1": {**params["bn1"], "bias": bias}}
        return jnp.sum(network.apply({**variables, "params": changed}, images, QuantContext()).logits ** 2)

    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_array_equal(gradient(jnp.zeros(4)), 0)
    assert np.all(gradient(jnp.full(4, 0.1)) != 0)


@pytest.mark.parametrize(
    ("name", "convolution", "classifier"),
    [
        ("standard_resnet20", he_fan_in_normal, he_fan_in_normal),
        ("standard_resnet18_cifar", he_fan_in_normal, he_fan_in_normal),
        ("standard_resnet18", he_fan_out_normal, fan_in_uniform),
        ("standard_resnet34", he_fan_out_normal, fan_in_uniform),
        ("standard_resnet50", he_fan_out_normal, fan_in_uniform),
    ],
)
def test_initial_weights_are_the_published_ones(name: str, convolution, classifier) -> None:
    found = initialisers_of(spec(name, stage_sizes=(1, 1), widths=(4, 8)))
    assert found.pop("fc") is classifier
    assert set(found.values()) == {convolution}


def test_initial_weights_of_vgg_are_fan_out_normal_with_a_small_classifier() -> None:
    choice = spec("standard_vgg_small", widths=(4,) * 6)
    found = initialisers_of(choice)
    assert {init for path, init in found.items() if path != "fc"} == {he_fan_out_normal}
    fc = networks.build(choice, QuantSpec(), num_classes=50).init(jax.random.key(0), images_of(1), QuantContext())
    kernel = fc["params"]["fc"]["kernel"]
    # 200 draws: within 20 %, four standard errors of a normal law.
    assert np.std(kernel) == pytest.approx(0.01, rel=0.2)
    np.testing.assert_array_equal(fc["params"]["fc"]["bias"], 0)


def test_an_option_overrules_the_published_initialiser() -> None:
    name = "standard_resnet18"
    options = {"kernel_init": "uniform", "full_precision_init": "he_fan_in_normal"}
    found = initialisers_of(spec(name, stage_sizes=(1, 1), widths=(4, 8), **options))
    assert found["layer1_0/conv1"] is fan_in_uniform
    assert found["conv1"] is found["layer2_0/downsample_conv"] is he_fan_in_normal


def test_all_but_the_ends_can_be_quantized() -> None:
    quant = QuantSpec(weight=spec("irnet"), act=spec("irnet"), shortcut=spec("irnet"))
    network = build(spec("standard_resnet50", stage_sizes=(1, 1), widths=(4, 8)), quant)
    _, collections = features_of(network, drawn_variables(network), images_of(2), train=True)
    # Only quantized layers leave a tap: three convolutions and a projection in either block.
    assert set(collections["taps"]) == {"layer1_0", "layer2_0"}
    assert all(set(block) == {"conv1", "conv2", "conv3", "downsample_conv"} for block in collections["taps"].values())
