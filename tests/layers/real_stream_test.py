"""Value swapping in a layer: the magnitude of the quantized output, the sign of the real-valued product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import BatchNorm, QuantConv, QuantDense
from bnn_jax.quantizers import QuantContext, build_act, build_weight
from bnn_jax.stages import IDENTITY, Spec, spec
from tests.layers.conv_test import explicit_convolution

QUANT, REAL = QuantContext(), QuantContext(stream="real")
PADDING = ((1, 1), (1, 1))


def conv(weight: Spec, act: Spec = IDENTITY, **options: Any) -> QuantConv:
    return QuantConv(5, strides=(2, 2), weight_quantizer=build_weight(weight), act_quantizer=build_act(act), **options)


def random(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(0.1, 1.0, shape), jnp.float32)


def both_streams(layer: Any, x: jax.Array, r: jax.Array, variables: Any = None) -> tuple[np.ndarray, np.ndarray, Any]:
    """Output of the first pass, that of the real stream, and the variables."""
    variables = variables or {
        name: value for name, value in layer.init(jax.random.key(0), x, QUANT).items() if name != "taps"
    }
    y, updates = layer.apply(variables, x, QUANT, mutable=["taps"])
    z = layer.apply({**variables, **updates}, r, REAL)
    return np.asarray(y), np.asarray(z), variables


def test_the_real_stream_takes_its_magnitude_from_the_first_pass_and_its_sign_from_real_values() -> None:
    x, r = random((2, 6, 6, 4), 0), random((2, 6, 6, 4), 1)
    y, z, variables = both_streams(conv(spec("irnet"), spec("irnet")), x, r)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    standardized = (kernel - kernel.mean(axis=(0, 1, 2))) / kernel.std(axis=(0, 1, 2), ddof=1)
    q = explicit_convolution(r, standardized, (2, 2), PADDING)
    # Far enough from 0 that float32 gives the same sign.
    assert np.abs(q).min() > 1e-4
    np.testing.assert_array_equal(z, np.abs(y) * np.sign(q))
    assert (np.sign(z) != np.sign(y)).mean() > 0.2


def test_the_real_stream_is_0_where_either_product_is_0() -> None:
    x, r = random((2, 6, 6, 4), 0), random((2, 6, 6, 4), 1)
    # A first pass of zeros, and real activations that are 0 in one corner.
    r = r.at[:, :4, :4].set(0.0)
    y, z, variables = both_streams(conv(spec("irnet"), spec("irnet")), x, r)
    assert (y[:, 0, 0] != 0).any()
    np.testing.assert_array_equal(z[:, 0, 0], 0)
    _, z, _ = both_streams(conv(spec("irnet"), spec("irnet")), jnp.zeros_like(x), r, variables)
    np.testing.assert_array_equal(z, 0)


def test_the_first_pass_does_not_depend_on_the_real_stream() -> None:
    x = random((2, 6, 6, 4), 0)
    layer = conv(spec("irnet"), spec("irnet"))
    first, z1, variables = both_streams(layer, x, random((2, 6, 6, 4), 1))
    second, z2, _ = both_streams(layer, x, random((2, 6, 6, 4), 2), variables)
    np.testing.assert_array_equal(first, second)
    assert (z1 != z2).any()


def test_the_first_pass_is_the_same_whether_its_outputs_are_kept_or_not() -> None:
    x = random((2, 6, 6, 4), 0)
    layer = conv(spec("irnet"), spec("irnet"))
    y, _, variables = both_streams(layer, x, x)
    np.testing.assert_array_equal(layer.apply(variables, x, QUANT), y)


@pytest.mark.parametrize(
    "layer",
    [
        conv(spec("irnet"), spec("irnet"), use_bias=False),
        QuantDense(5, weight_quantizer=build_weight(spec("sign")), act_quantizer=build_act(spec("sign"))),
    ],
    ids=["conv", "dense"],
)
def test_the_swapped_values_have_no_gradient(layer: Any) -> None:
    x = random((2, 6, 6, 4) if isinstance(layer, QuantConv) else (2, 7), 0)
    variables = layer.init(jax.random.key(0), x, QUANT)
    variables = {"params": variables["params"]}

    def total(params: Any, r: jax.Array) -> jax.Array:
        _, taps = layer.apply({"params": params}, x, QUANT, mutable=["taps"])
        return jnp.sum(layer.apply({"params": params, **taps}, r, REAL) ** 2)

    gradients, by_input = jax.grad(total, argnums=(0, 1))(variables["params"], random(x.shape, 1))
    np.testing.assert_array_equal(gradients["kernel"], 0)
    np.testing.assert_array_equal(by_input, 0)


def test_a_dense_layer_swaps_before_its_bias() -> None:
    layer = QuantDense(5, weight_quantizer=build_weight(spec("sign")), act_quantizer=build_act(spec("sign")))
    x, r = random((3, 7), 0), random((3, 7), 1)
    _, z, variables = both_streams(layer, x, r)
    kernel, bias = (np.asarray(variables["params"][name], np.float64) for name in ("kernel", "bias"))
    product = np.abs(np.sign(x) @ np.sign(kernel))
    # The real weights of the plain sign are the raw ones.
    np.testing.assert_allclose(z, product * np.sign(np.asarray(r, np.float64) @ kernel) + bias, rtol=1e-6)


def test_a_layer_without_quantized_weights_works_alike_in_both_streams() -> None:
    layer = conv(IDENTITY)
    x, r = random((2, 6, 6, 4), 0), random((2, 6, 6, 4), 1)
    _, z, variables = both_streams(layer, x, r)
    np.testing.assert_array_equal(z, layer.apply(variables, r, QUANT))
    assert "taps" not in layer.apply(variables, x, QUANT, mutable=["taps"])[1]


def test_the_real_stream_of_pruned_weights_is_masked_too() -> None:
    x, r = random((2, 6, 6, 4), 0), random((2, 6, 6, 4), 1)
    layer = conv(spec("pruned", inner=spec("dorefa", bits=1), amount=0.4, apply_mask="after"), spec("irnet"))
    y, z, variables = both_streams(layer, x, r)
    mask = np.asarray(variables["quant_state"]["weight_quantizer"]["mask"], np.float64)
    assert 0 < mask.mean() < 1
    q = explicit_convolution(r, np.asarray(variables["params"]["kernel"], np.float64) * mask, (2, 2), PADDING)
    np.testing.assert_array_equal(z, np.abs(y) * np.sign(q))


@pytest.mark.parametrize("train", [True, False])
def test_the_norm_of_the_real_stream_leaves_the_running_statistics_alone(train: bool) -> None:
    x, r = random((4, 3, 3, 5), 0), 5 + 3 * random((4, 3, 3, 5), 1)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, QUANT)
    variables["params"]["scale"], variables["params"]["bias"] = random((5,), 2), random((5,), 3)
    z, updates = norm.apply(variables, r, QuantContext(train=train, stream="real"), mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    # In training by the statistics of its own batch, in evaluation by the shared ones; scale and bias are shared.
    r = np.asarray(r, np.float64)
    mean, var = (r.mean(axis=(0, 1, 2)), r.var(axis=(0, 1, 2))) if train else (0.0, 1.0)
    scale, bias = (np.asarray(variables["params"][name], np.float64) for name in ("scale", "bias"))
    np.testing.assert_allclose(z, (r - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-5, atol=1e-5)
