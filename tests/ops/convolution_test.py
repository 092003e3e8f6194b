"""Our convolutions, instruction set by instruction set, against XLA's."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.ops import convolution as own

SAME, NONE = ((1, 1), (1, 1)), ((0, 0), (0, 0))

# (N, H, W, I), (kh, kw, O), strides, padding.
CASES = {
    "one vector of channels": ((2, 5, 6, 3), (3, 3, 8), (1, 1), SAME),
    # Two tiles of channels on every machine, the last of them not full.
    "many channels": ((2, 6, 7, 20), (3, 3, 90), (1, 1), SAME),
    "stride of 2": ((2, 8, 9, 16), (3, 3, 32), (2, 2), SAME),
    "padded below only": ((2, 8, 8, 16), (3, 3, 16), (2, 2), ((0, 1), (0, 1))),
    "1x1": ((3, 4, 5, 16), (1, 1, 24), (1, 1), NONE),
    # The input's gradient is zero between the positions.
    "1x1, stride of 2": ((2, 7, 8, 16), (1, 1, 16), (2, 2), NONE),
    "uneven": ((2, 9, 7, 5), (2, 5, 7), (2, 1), ((0, 1), (3, 0))),
    # The products of a sum are in several chunks.
    "long sums": ((1, 3, 3, 400), (3, 3, 16), (1, 1), SAME),
    # Several images are worked on at a time, in each of several blocks, and the last ones are fewer.
    "many small images": ((37, 3, 3, 8), (3, 3, 8), (1, 1), SAME),
    # A row of an image has more values than are copied at a time.
    "wide": ((1, 5, 700, 32), (3, 3, 8), (1, 1), SAME),
}

pytestmark = pytest.mark.skipif(not own.instruction_sets(), reason="the kernels were not compiled at installation")


def xla(x: jax.Array, kernel: jax.Array, strides: own.Pair, padding: own.Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def random(*shapes: tuple[int, ...]) -> list[jax.Array]:
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]


def value_and_gradients(function, x, kernel, strides, padding, *more):
    y, pullback = jax.vjp(lambda x, kernel: function(x, kernel, strides, padding, *more), x, kernel)
    (cotangent,) = random(y.shape)
    return (y, *pullback(cotangent))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    shape, (height, width, features), *window = CASES[request.param]
    operands = random(shape, (height, width, shape[3], features))
    return operands, window, value_and_gradients(xla, *operands, *window)


@pytest.mark.parametrize("name", ["avx512", "avx2", "plain", "wide"])
def test_convolution_and_gradients_are_those_of_xla(case, name):
    if name not in own.instruction_sets():
        pytest.skip(f"this machine has no {name}")
    operands, window, expected = case
    found = value_and_gradients(own.convolution, *operands, *window, own.instruction_sets()[name])
    for one, reference in zip(found, expected, strict=True):
        # Sums of up to 3600 products in another order, relative to the largest of them.
        np.testing.assert_allclose(one, reference, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(reference))))


def test_the_order_of_the_sums_does_not_depend_on_which_thread_is_free():
    operands = random((64, 8, 8, 16), (3, 3, 16, 64))
    run = jax.jit(lambda x, kernel: value_and_gradients(own.convolution, x, kernel, (1, 1), SAME))
    first = run(*operands)
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, run(*operands), first)


@pytest.mark.parametrize("name", ["avx512", "avx2", "plain", "wide"])
@pytest.mark.parametrize("shapes", CASES)
def test_ternary_operands_are_convolved_exactly(shapes, name):
    if name not in own.instruction_sets():
        pytest.skip(f"this machine has no {name}")
    shape, (height, width, features), *window = CASES[shapes]
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.choice([-1, 0, 1], shape), jnp.float32)
    signs = jnp.asarray(generator.choice([-1, 0, 1], (height, width, shape[3], features)), jnp.float32)
    scales = jnp.asarray(generator.uniform(0.1, 2, (1, 1, 1, features)), jnp.float32)
    number = own.instruction_sets()[name]
    # The sums are whole numbers, which float32 holds exactly.
    sums = jnp.round(xla(x, signs, *window))
    np.testing.assert_array_equal(own.convolution(x, signs, *window, number), sums)
    # A last bit for each addition where a set adds the scaled products instead.
    scaled = own.convolution(x, signs * scales, *window, number)
    np.testing.assert_allclose(scaled, sums * scales, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(sums))))


@pytest.mark.parametrize("name", ["avx512", "avx2"])
@pytest.mark.parametrize("spoil", ["first value", "last value", "not a number", "weight"])
def test_operands_that_are_almost_ternary_are_convolved_as_floats(spoil, name):
    if name not in own.instruction_sets():
        pytest.skip(f"this machine has no {name}")
    generator = np.random.default_rng(0)
    x = generator.choice([-1, 1], (4, 9, 9, 32)).astype(np.float32)
    kernel = generator.choice([-1, 1], (3, 3, 32, 40)).astype(np.float32)
    if spoil == "weight":
        kernel[-1, -1, -1, -1] = 0.5
    else:
        index = (0, 0, 0, 0) if spoil == "first value" else (-1, -1, -1, -1)
        x[index] = np.nan if spoil == "not a number" else 2.5
    found = own.convolution(x, kernel, (1, 1), SAME, own.instruction_sets()[name])
    # Multiples of 1/2 below 1,000: exact in any order.
    np.testing.assert_array_equal(found, xla(jnp.asarray(x), jnp.asarray(kernel), (1, 1), SAME))


def test_a_mapped_convolution_is_one_after_another():
    xs, kernels = random((3, 2, 4, 4, 8), (3, 3, 3, 8, 8))
    mapped = jax.vmap(lambda x, kernel: own.convolution(x, kernel, (1, 1), SAME))(xs, kernels)
    each = [own.convolution(x, kernel, (1, 1), SAME) for x, kernel in zip(xs, kernels)]
    np.testing.assert_array_equal(mapped, jnp.stack(each))


def test_a_gradient_that_nobody_asks_for_is_not_computed():
    x, kernel = random((2, 4, 4, 3), (3, 3, 3, 8))
    loss = jax.jit(jax.grad(lambda kernel: jnp.sum(own.convolution(x, kernel, (1, 1), SAME) ** 2)))
    text = loss.lower(kernel).compile().as_text()
    assert own.KERNEL_GRADIENT in text and own.INPUT_GRADIENT not in text


@pytest.mark.parametrize(
    ("dtype", "padding", "groups", "expected"),
    [
        (jnp.float32, SAME, 1, True),
        (jnp.bfloat16, SAME, 1, False),
        (jnp.float32, SAME, 2, False),
        (jnp.float32, ((-1, 1), (1, 1)), 1, False),
    ],
)
def test_other_convolutions_are_left_to_xla(dtype, padding, groups, expected):
    x, kernel = (value.astype(dtype) for value in random((2, 4, 4, 8), (3, 3, 8 // groups, 8)))
    assert own.is_supported(x, kernel, padding, groups) == expected


def test_the_best_instruction_set_is_chosen_on_one_cpu_only():
    assert own.choice("auto") == next(iter(own.instruction_sets())) and own.choice("xla") == "xla"
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        assert own.choice("auto") == "xla"
    with mock.patch.object(jax, "device_count", lambda: 2):
        assert own.choice("auto") == "xla"


def test_without_a_library_xla_convolves():
    with mock.patch.object(own, "instruction_sets", dict):
        assert own.choice("auto") == "xla"
