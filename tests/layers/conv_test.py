import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import QuantConv, QuantDense
from bnn_jax.layers.conv import fan_in_uniform
from bnn_jax.ops import convolution as own
from bnn_jax.quantizers import QuantContext, build_act, build_weight
from bnn_jax.stages import IDENTITY, Spec, spec

CTX = QuantContext()


def random(shape: tuple[int, ...], seed: int = 0, low: float = -0.5, high: float = 1.5) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).uniform(low, high, shape), jnp.float32)


def make(weight: Spec = IDENTITY, act: Spec = IDENTITY, **options) -> QuantConv:
    return QuantConv(weight_quantizer=build_weight(weight), act_quantizer=build_act(act), **options)


def explicit_convolution(x, kernel, strides, padding, groups: int = 1) -> np.ndarray:
    """The definition, in float64: a sum over window and input channels at every output position."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    kh, kw, per_group, features = kernel.shape
    height, width = ((x.shape[1 + i] - kernel.shape[i]) // strides[i] + 1 for i in range(2))
    y = np.zeros((len(x), height, width, features))
    for o in range(features):
        first = o // (features // groups) * per_group
        for i in range(height):
            for j in range(width):
                window = x[:, i * strides[0] : i * strides[0] + kh, j * strides[1] : j * strides[1] + kw]
                y[:, i, j, o] = np.sum(window[..., first : first + per_group] * kernel[..., o], axis=(1, 2, 3))
    return y


@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding", "groups"),
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1)), 1),
        ((3, 3), (2, 2), ((1, 1), (1, 1)), 1),
        ((1, 1), (2, 2), ((0, 0), (0, 0)), 1),
        ((3, 1), (1, 2), ((2, 0), (0, 1)), 2),
    ],
)
def test_convolution_is_that_of_quantized_operands_with_zero_padding(kernel_size, strides, padding, groups) -> None:
    x = random((2, 7, 6, 4))
    conv = make(
        spec("dorefa", bits=2),
        spec("dorefa", bits=2),
        features=6,
        kernel_size=kernel_size,
        strides=strides,
        padding=padding,
        groups=groups,
    )
    variables = conv.init(jax.random.key(0), x, CTX)
    quantized_x = build_act(spec("dorefa", bits=2))().apply({}, x, CTX)
    quantized_kernel = build_weight(spec("dorefa", bits=2))().apply({}, variables["params"]["kernel"], CTX)
    expected = explicit_convolution(quantized_x, quantized_kernel, strides, padding, groups)
    # Up to 200 float32 products of magnitude up to 0.5 are summed.
    np.testing.assert_allclose(conv.apply(variables, x, CTX), expected, atol=1e-5)


def test_padding_is_zero_not_a_level_of_the_activations() -> None:
    # One-bit activations of a constant 1 and weights +E: a corner sees 4 of 9 products, an edge 6.
    conv = make(spec("dorefa", bits=1), spec("dorefa", bits=1), features=1)
    y = conv.apply({"params": {"kernel": jnp.full((3, 3, 1, 1), 0.5)}}, jnp.ones((1, 4, 4, 1)), CTX)[0, :, :, 0]
    np.testing.assert_array_equal(y[0], [2, 3, 3, 2])
    np.testing.assert_array_equal(y[1], [3, 4.5, 4.5, 3])


CODES = [
    (spec("dorefa", bits=bits, **options), spec("dorefa", bits=bits))
    for bits, options in [(1, {}), (1, {"one_bit": "levels"}), (2, {}), (4, {}), (8, {})]
]


def both_types(weight: Spec, act: Spec, x: jax.Array):
    """The layer in float32 and in bfloat16, and its variables."""
    layers = [make(weight, act, features=20, compute_dtype=dtype) for dtype in ("float32", "bfloat16")]
    return *layers, layers[0].init(jax.random.key(1), x, CTX)


def runs_in_bfloat16(layer: QuantConv, variables, x: jax.Array) -> bool:
    """Whether the layer's program holds bfloat16 values."""
    return "bf16" in str(jax.make_jaxpr(lambda x: layer.apply(variables, x, CTX))(x))


@pytest.mark.parametrize(("weight", "act"), CODES)
def test_bfloat16_on_integer_codes_equals_float32_within_summation(weight: Spec, act: Spec) -> None:
    x = random((2, 6, 6, 16))
    exact, fast, variables = both_types(weight, act, x)
    assert runs_in_bfloat16(fast, variables, x)
    assert not runs_in_bfloat16(exact, variables, x)
    y = exact.apply(variables, x, CTX)
    # Codes are exact in bfloat16 and sums are float32 in both: what is left is the order of 144 float32 additions and
    # the last bit of the scales, 2e-6 of the largest output.
    np.testing.assert_allclose(fast.apply(variables, x, CTX), y, rtol=0, atol=2e-6 * float(jnp.abs(y).max()))


@pytest.mark.parametrize(("weight", "act"), CODES)
def test_bfloat16_gradients_are_the_float32_ones(weight: Spec, act: Spec) -> None:
    x, cotangent = random((2, 6, 6, 16)), random((2, 6, 6, 20), seed=1)
    exact, fast, variables = both_types(weight, act, x)

    def gradients(layer):
        return jax.grad(lambda v, x: jnp.sum(layer.apply(v, x, CTX) * cotangent), argnums=(0, 1))(variables, x)

    # The backward pass is the same float32 program on the same operands.
    jax.tree.map(np.testing.assert_array_equal, gradients(fast), gradients(exact))


def test_bfloat16_with_pruned_codes_equals_float32_within_summation() -> None:
    weight = spec("pruned", inner=spec("dorefa", bits=4), amount=0.2, apply_mask="after")
    x = random((2, 6, 6, 16))
    exact, fast, variables = both_types(weight, spec("dorefa", bits=4), x)
    y = exact.apply(variables, x, CTX)
    np.testing.assert_allclose(fast.apply(variables, x, CTX), y, rtol=0, atol=2e-6 * float(jnp.abs(y).max()))


@pytest.mark.parametrize(
    ("weight", "act"), [(spec("dorefa", bits=4), IDENTITY), (IDENTITY, spec("dorefa", bits=4)), (IDENTITY, IDENTITY)]
)
def test_an_operand_without_codes_keeps_the_convolution_in_float32(weight: Spec, act: Spec) -> None:
    x = random((1, 4, 4, 3))
    exact, fast, variables = both_types(weight, act, x)
    assert not runs_in_bfloat16(fast, variables, x)
    np.testing.assert_array_equal(fast.apply(variables, x, CTX), exact.apply(variables, x, CTX))


@pytest.mark.parametrize(
    "layer", [functools.partial(QuantConv, features=20), functools.partial(QuantDense, features=20)]
)
def test_parameters_have_the_same_paths_and_shapes_under_every_quantizer(layer) -> None:
    # So a rung of the chain takes over the weights of the rung before without renaming.
    x = random((2, 5, 5, 8)) if layer.func is QuantConv else random((2, 8))
    choices = [IDENTITY, *(spec("dorefa", bits=bits) for bits in (8, 4, 2, 1))]
    shapes = [
        jax.eval_shape(layer(weight_quantizer=build_weight(choice)).init, jax.random.key(0), x, CTX)["params"]
        for choice in choices
    ]
    assert all(shape == shapes[0] for shape in shapes)
    assert shapes[0]["kernel"].shape[-1] == 20


def test_dense_is_the_product_of_quantized_operands_plus_bias() -> None:
    x = random((3, 12))
    dense = QuantDense(features=5, weight_quantizer=build_weight(spec("dorefa", bits=4)))
    variables = dense.init(jax.random.key(2), x, CTX)
    kernel = build_weight(spec("dorefa", bits=4))().apply({}, variables["params"]["kernel"], CTX)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(variables["params"]["bias"])
    # 12 float32 products of magnitude up to 0.4 are summed.
    np.testing.assert_allclose(dense.apply(variables, x, CTX), expected, atol=1e-6)


def test_bias_is_absent_unless_asked_for() -> None:
    x = random((1, 4, 4, 3))
    for use_bias in (False, True):
        params = make(features=2, use_bias=use_bias).init(jax.random.key(0), x, CTX)["params"]
        assert ("bias" in params) == use_bias


def test_default_kernels_are_uniform_within_one_over_the_root_of_fan_in() -> None:
    kernel = np.asarray(fan_in_uniform(jax.random.key(0), (3, 3, 64, 64)))
    bound = 1 / np.sqrt(3 * 3 * 64)
    assert np.abs(kernel).max() <= bound
    # 36,864 draws: the standard deviation of a uniform law is bound / sqrt(3), its estimate within 2 %.
    assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)


def test_initial_variables_are_those_that_are_trained_and_not_what_a_pass_hands_out() -> None:
    x, conv = random((1, 4, 4, 2)), make(spec("irnet"), spec("irnet"), features=3)
    variables = conv.init(jax.random.key(0), x, CTX)
    assert variables.keys() == {"params"}
    y, updates = conv.apply(variables, x, CTX, mutable=["taps"])
    np.testing.assert_array_equal(updates["taps"]["output"], y)


def test_float64_operands_are_multiplied_in_float64() -> None:
    conv = make(features=3)
    with jax.enable_x64(True):
        x, kernel = (np.random.RandomState(seed).normal(size=s) for seed, s in enumerate([(1, 4, 4, 2), (3, 3, 2, 3)]))
        y = conv.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x), CTX)
        # 18 products of size 1: float32 would be wrong by 1e-6.
        np.testing.assert_allclose(y, explicit_convolution(x, kernel, (1, 1), ((1, 1), (1, 1))), rtol=0, atol=1e-13)


@pytest.mark.skipif(not own.instruction_sets(), reason="the kernels were not compiled at installation")
def test_on_a_cpu_our_kernels_convolve_unless_those_of_xla_are_asked_for() -> None:
    x, programs, outputs = random((2, 6, 6, 16)), {}, {}
    for cpu_kernels in ("auto", "xla"):
        layer = make(IDENTITY, IDENTITY, features=8, cpu_kernels=cpu_kernels)
        variables = layer.init(jax.random.key(1), x, CTX)
        programs[cpu_kernels] = str(jax.make_jaxpr(lambda x, v=variables, layer=layer: layer.apply(v, x, CTX))(x))
        outputs[cpu_kernels] = layer.apply(variables, x, CTX)
    assert own.FORWARD in programs["auto"] and "conv_general_dilated" not in programs["auto"]
    assert own.FORWARD not in programs["xla"] and "conv_general_dilated" in programs["xla"]
    # 144 float32 additions in another order.
    np.testing.assert_allclose(outputs["auto"], outputs["xla"], atol=1e-5)
