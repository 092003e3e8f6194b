"""Blocks and networks of IR-Net and SKD-BNN, written out once more in NumPy; counts are in battery_test.py."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import networks
from bnn_jax.experiment import start
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import QuantSpec, Spec, spec
from tests.layers.conv_test import explicit_convolution

REAL = QuantSpec()
IRNET = QuantSpec(weight=spec("irnet"), act=spec("irnet"))
# Ten layers of float32 against float64; there is no rounding to flip without quantizers.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def images_of(rows: int, side: int = 8, channels: int = 3) -> jax.Array:
    return jnp.asarray(np.random.RandomState(0).normal(size=(rows, side, side, channels)), jnp.float32)


def build(choice: Spec, quant: QuantSpec = REAL, num_classes: int = 4) -> Any:
    return networks.build(choice, quant, num_classes=num_classes)


def drawn_variables(network: Any, image_shape: tuple[int, int, int] = (8, 8, 3)) -> dict[str, Any]:
    random = np.random.RandomState(1)

    def draw(path, leaf) -> np.ndarray:
        value = random.normal(0, 0.3, leaf.shape).astype(np.float32)
        return 1 + np.abs(value) if path[-1].key in ("scale", "var") else value

    return jax.tree_util.tree_map_with_path(draw, start.variable_shapes(network, image_shape))


def features_of(network: Any, variables: dict[str, Any], images: jax.Array, **ctx: Any) -> tuple[Any, dict[str, Any]]:
    apply = jax.jit(
        lambda v, x: network.apply(
            v, x, QuantContext(**ctx), mutable=["batch_stats", "taps", "block_features"], rngs={"quant": key(1)}
        )
    )
    return apply({name: value for name, value in variables.items() if value}, images)


def key(seed: int) -> jax.Array:
    return jax.random.key(seed)


class Reference:
    """A network in evaluation mode without quantizers, in float64."""

    def __init__(self, variables: dict[str, Any]):
        self.variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)

    def leaf(self, collection: str, *path: str) -> np.ndarray:
        return functools.reduce(lambda tree, name: tree[name], path, self.variables[collection])

    def conv(self, x: np.ndarray, *path: str, stride: int = 1, pad: int = 1) -> np.ndarray:
        kernel = self.leaf("params", *path, "kernel")
        return explicit_convolution(x, kernel, (stride, stride), ((pad, pad), (pad, pad)))

    def norm(self, x: np.ndarray, *path: str) -> np.ndarray:
        mean, var = (self.leaf("batch_stats", *path, name) for name in ("mean", "var"))
        scale, bias = (self.leaf("params", *path, name) for name in ("scale", "bias"))
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def dense(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.leaf("params", name, "kernel") + self.leaf("params", name, "bias")

    def block(self, x: np.ndarray, name: str, *, stride: int, kind: str) -> list[np.ndarray]:
        """Both outputs of a residual block, each after its clip."""
        y1 = self.norm(self.conv(x, name, "conv1", stride=stride), name, "bn1")
        skip = self.shortcut(x, name, stride=stride, width=y1.shape[-1], padded=kind == "double_skip_padded")
        a1 = clip(y1 if kind == "single_skip" else y1 + skip)
        y2 = self.norm(self.conv(a1, name, "conv2"), name, "bn2")
        return [a1, clip(y2 + (skip if kind == "single_skip" else a1))]

    def shortcut(self, x: np.ndarray, name: str, *, stride: int, width: int, padded: bool) -> np.ndarray:
        if stride == 1 and x.shape[-1] == width:
            return x
        if not padded:
            return self.norm(self.conv(x, name, "downsample_conv", stride=stride, pad=0), name, "downsample_bn")
        zeros = np.zeros((*x[:, ::2, ::2].shape[:3], width // 4))
        return np.concatenate([zeros, x[:, ::2, ::2], zeros], axis=-1)


def clip(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -1, 1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("double_skip_padded", "hardtanh_resnet20"), ("single_skip", "hardtanh_resnet18_cifar")],
)
def test_cifar_resnets_follow_the_published_blocks(kind: str, name: str) -> None:
    network = build(spec(name, stage_sizes=(1, 2), widths=(4, 8)))
    variables, images = drawn_variables(network), images_of(2)
    output, collections = features_of(network, variables, images)
    reference = Reference(variables)
    x = clip(reference.norm(reference.conv(np.asarray(images), "conv1"), "bn1"))
    pairs = []
    for block, stride in (("layer1_0", 1), ("layer2_0", 2), ("layer2_1", 1)):
        pairs += reference.block(x, block, stride=stride, kind=kind)
        x = pairs[-1]
    for feature, expected in zip(jax.tree.leaves(collections["block_features"]), pairs, strict=True):
        np.testing.assert_allclose(feature, expected, **TOLERANCE)
    pooled = reference.norm(x.mean(axis=(1, 2)), "bn2")
    np.testing.assert_allclose(output.features, pooled, **TOLERANCE)
    np.testing.assert_allclose(output.logits, reference.dense(pooled, "fc"), **TOLERANCE)


def test_the_imagenet_resnet_has_two_skips_and_a_pooled_stem() -> None:
    network = build(spec("hardtanh_resnet18", stage_sizes=(1, 1), widths=(4, 8)))
    variables, images = drawn_variables(network, (16, 16, 3)), images_of(2, side=16)
    output, _ = features_of(network, variables, images)
    reference = Reference(variables)
    stem = clip(reference.norm(reference.conv(np.asarray(images), "conv1", stride=2, pad=3), "bn1"))
    padded = np.pad(stem, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = [padded[:, i : i + 8 : 2, j : j + 8 : 2] for i in range(3) for j in range(3)]
    x = np.max(windows, axis=0)
    for block, stride in (("layer1_0", 1), ("layer2_0", 2)):
        x = reference.block(x, block, stride=stride, kind="double_skip")[-1]
    np.testing.assert_allclose(output.features, reference.norm(x.mean(axis=(1, 2)), "bn2"), **TOLERANCE)


def test_vgg_pools_before_its_norm_and_flattens_channel_by_channel() -> None:
    network = build(spec("hardtanh_vgg_small", widths=(4, 4, 6, 6, 8, 8)))
    variables, images = drawn_variables(network, (16, 16, 3)), images_of(2, side=16)
    output, collections = features_of(network, variables, images)
    reference, x, pairs = Reference(variables), np.asarray(images, np.float64), []
    for index in range(6):
        x = reference.conv(x, f"conv{index}")
        if index in (1, 3, 5):
            x = np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)
        x = clip(reference.norm(x, f"bn{index}"))
        pairs += [x] if index else []
    for feature, expected in zip(jax.tree.leaves(collections["block_features"]), pairs, strict=True):
        np.testing.assert_allclose(feature, expected, **TOLERANCE)
    flat = np.stack([x[..., channel].reshape(2, -1) for channel in range(8)], axis=1).reshape(2, -1)
    np.testing.assert_allclose(output.features, flat, **TOLERANCE)
    np.testing.assert_allclose(output.logits, reference.dense(flat, "fc"), **TOLERANCE)


def test_the_gradient_of_pooled_ties_goes_to_the_first_maximum_in_row_major_order() -> None:
    # Binary convolutions give small integers: ties are the rule, and a gradient that is split among them is wrong.
    # This is the pooling HardTanhVgg calls.
    pool = jax.jit(jax.grad(lambda x: jnp.sum(nn.max_pool(x, (2, 2), strides=(2, 2)) * cotangent)))
    cotangent = jnp.asarray(np.random.RandomState(0).normal(size=(1, 2, 2, 1)), jnp.float32)
    x = np.array([[1, 1, 0, 2], [1, 1, 2, 2], [0, 3, 0, 0], [3, 3, 0, 0]], np.float32).reshape(1, 4, 4, 1)
    expected = np.zeros((1, 4, 4, 1), np.float32)
    for row, column, window in ((0, 0, (0, 0)), (0, 3, (0, 1)), (2, 1, (1, 0)), (2, 2, (1, 1))):
        expected[0, row, column, 0] = cotangent[0, window[0], window[1], 0]
    np.testing.assert_array_equal(pool(jnp.asarray(x)), expected)


@pytest.mark.parametrize(
    ("name", "pairs", "side"),
    [
        ("hardtanh_resnet20", 18, 32),
        ("hardtanh_resnet18_cifar", 16, 32),
        ("hardtanh_resnet18", 16, 224),
        ("hardtanh_vgg_small", 5, 32),
        ("hardtanh_mlp", 3, 28),
    ],
)
def test_number_of_features_that_are_compared(name: str, pairs: int, side: int) -> None:
    network = build(spec(name), IRNET)
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    keys = {"params": key(0), "quant": key(0)}
    ctx = QuantContext(train=True)

    def collect(x: jax.Array) -> Any:
        variables = network.init(keys, x, ctx)
        return network.apply(variables, x, ctx, mutable=["batch_stats", "taps", "block_features"], rngs=keys)[1]

    kept = jax.eval_shape(collect, images)
    assert len(jax.tree.leaves(kept["block_features"])) == pairs
    # One output of the binary product for each, which the real stream takes its magnitudes from.
    assert len(jax.tree.leaves(kept["taps"])) == pairs


# ---- the binary network


def binary_network() -> tuple[Any, dict[str, Any]]:
    network = build(spec("hardtanh_resnet20", stage_sizes=(1, 1), widths=(4, 8)), IRNET)
    return network, drawn_variables(network)


def test_products_are_integers_times_a_power_of_two_and_no_larger_than_the_filter() -> None:
    network, variables = binary_network()
    _, collections = features_of(network, variables, images_of(3), train=True)
    for name in ("layer1_0", "layer2_0"):
        for conv in ("conv1", "conv2"):
            kernel = variables["params"][name][conv]["kernel"].astype(np.float64)
            w = (kernel - kernel.mean(axis=(0, 1, 2))) / kernel.std(axis=(0, 1, 2), ddof=1)
            scale = 2.0 ** np.round(np.log2(np.abs(w).mean(axis=(0, 1, 2))))
            codes = np.asarray(collections["taps"][name][conv]["output"]) / scale
            np.testing.assert_array_equal(codes, np.round(codes))
            assert 0 < np.abs(codes).max() <= kernel[..., 0].size


def test_the_value_does_not_depend_on_the_knobs_of_the_gradient() -> None:
    network, variables = binary_network()
    logits = [
        features_of(network, variables, images_of(3), train=True, knobs={"error_decay_k": k, "error_decay_t": t})[0]
        for k, t in ((1000.0, 1e-3), (1.0, 9.0))
    ]
    np.testing.assert_array_equal(logits[0].logits, logits[1].logits)


def test_the_value_does_not_depend_on_factor_and_shift_of_the_binary_weights() -> None:
    network, variables = binary_network()
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    for conv in ("conv1", "conv2"):
        params["layer1_0"][conv]["kernel"] = 4 * params["layer1_0"][conv]["kernel"] + 0.5
    one, other = (
        features_of(network, {**variables, "params": p}, images_of(3))[0] for p in (variables["params"], params)
    )
    np.testing.assert_array_equal(one.logits, other.logits)


def test_first_convolution_shortcuts_and_classifier_stay_full_precision() -> None:
    network = build(spec("hardtanh_resnet18_cifar", stage_sizes=(1, 1), widths=(4, 8)), IRNET)
    _, collections = features_of(network, drawn_variables(network), images_of(2), train=True)
    # Only quantized layers leave a tap.
    assert set(collections["taps"]) == {"layer1_0", "layer2_0"}
    assert set(collections["taps"]["layer2_0"]) == {"conv1", "conv2"}


# ---- initial values (section 2.5 of the specification)


def initial_parameters(choice: Spec, side: int = 8) -> dict[str, Any]:
    network = build(choice, IRNET)
    keys = {"params": key(0), "quant": key(0)}
    return jax.jit(lambda x: network.init(keys, x, QuantContext(train=True)))(images_of(1, side=side))["params"]


def test_initial_weights_of_the_cifar_resnets_are_fan_in_normal() -> None:
    init = "he_fan_in_normal"
    choice = spec(
        "hardtanh_resnet18_cifar", stage_sizes=(1, 1), widths=(16, 32), kernel_init=init, full_precision_init=init
    )
    params = initial_parameters(choice)
    # 2,304 draws: within 5 % (three standard errors of a normal law); 432 and 512 draws: within 12 %.
    assert np.std(params["layer1_0"]["conv1"]["kernel"]) == pytest.approx(np.sqrt(2 / 144), rel=0.05)
    assert np.std(params["conv1"]["kernel"]) == pytest.approx(np.sqrt(2 / 27), rel=0.12)
    assert np.std(params["layer2_0"]["downsample_conv"]["kernel"]) == pytest.approx(np.sqrt(2 / 16), rel=0.12)
    # 128 draws: within 25 %.
    assert np.std(params["fc"]["kernel"]) == pytest.approx(np.sqrt(2 / 32), rel=0.25)
    assert np.abs(params["fc"]["bias"]).max() <= 1 / np.sqrt(32)


def test_initial_weights_of_vgg_are_fan_out_normal_with_a_small_classifier() -> None:
    widths = (16, 16, 16, 16, 16, 16)
    params = initial_parameters(spec("hardtanh_vgg_small", widths=widths, kernel_init="he_normal"))
    assert np.std(params["conv1"]["kernel"]) == pytest.approx(np.sqrt(2 / 144), rel=0.05)
    assert np.std(params["conv0"]["kernel"]) == pytest.approx(np.sqrt(2 / 144), rel=0.12)
    # 64 draws: within 30 %.
    assert np.std(params["fc"]["kernel"]) == pytest.approx(0.01, rel=0.3)
    np.testing.assert_array_equal(params["fc"]["bias"], 0)


# ---- the MLP


def mlp(dropout: float = 0.0, quant: QuantSpec | None = None) -> tuple[Any, dict[str, Any]]:
    network = build(spec("hardtanh_mlp", hidden=16, dropout=dropout), quant or REAL)
    return network, drawn_variables(network, (4, 4, 1))


def test_the_mlp_reads_the_pixels_as_they_are_and_binarises_the_rest() -> None:
    sign = QuantSpec(weight=spec("sign"), act=spec("sign"))
    network, variables = mlp(quant=sign)
    pixels = jnp.asarray(np.random.RandomState(0).uniform(size=(3, 4, 4, 1)), jnp.float32)
    output, collections = features_of(network, variables, pixels)
    x = np.asarray(pixels, np.float64).reshape(3, -1)
    reference = Reference(variables)
    for index in (1, 2, 3):
        kernel = np.sign(reference.leaf("params", f"fc{index}", "kernel"))
        product = (x if index == 1 else np.sign(x)) @ kernel
        # The bias comes after what the real stream reads.
        np.testing.assert_allclose(collections["taps"][f"fc{index}"]["output"], product, rtol=1e-5, atol=1e-5)
        x = clip(reference.norm(product + reference.leaf("params", f"fc{index}", "bias"), f"bn{index}"))
        np.testing.assert_allclose(collections["block_features"][f"after_fc{index}"], x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(output.logits, reference.dense(x, "fc4"), rtol=1e-4, atol=1e-4)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    network, _ = mlp(dropout=0.25)

    class Dropping(type(network)):
        def __call__(self, x, ctx):
            return self.drop(x)

    dropping = Dropping(layers=network.layers, num_classes=4, dropout=0.25)
    x = jnp.ones((100, 200))
    y = np.asarray(dropping.apply({}, x, QuantContext(train=True), rngs={"quant": key(0)}))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    # 20,000 draws: standard error 0.003.
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)


def test_dropout_acts_in_training_alone_and_on_the_third_layer_alone() -> None:
    (with_dropout, variables), (without, _) = mlp(dropout=0.5), mlp()
    pixels = images_of(8, side=4, channels=1)
    for train, same in ((False, ("after_fc1", "after_fc2", "after_fc3")), (True, ("after_fc1", "after_fc2"))):
        one, other = (
            features_of(network, variables, pixels, train=train)[1]["block_features"]
            for network in (with_dropout, without)
        )
        equal = {name for name in one if np.array_equal(one[name], other[name])}
        assert equal == set(same)


def test_irnet_quantizes_any_network() -> None:
    network = build(spec("resnet8", stage_sizes=(1, 1), widths=(4, 6)), IRNET)
    output, collections = features_of(network, drawn_variables(network), images_of(2), train=True)
    assert np.isfinite(output.logits).all()
    assert len(jax.tree.leaves(collections["taps"])) == 4
