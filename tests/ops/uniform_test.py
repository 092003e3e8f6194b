"""Facts of the ASBQ quantizers (specification, section 7) and their behaviour at zero and at ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.ops import uniform


@pytest.fixture
def gaussian() -> jax.Array:
    return jnp.asarray(np.random.RandomState(0).normal(0, 0.1, (3, 3, 8, 20)), jnp.float32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_levels_are_symmetric_exclude_zero_and_reach_the_range(gaussian, bits: int) -> None:
    q = np.asarray(uniform.dorefa_weight(gaussian, bits))
    top = np.tanh(np.abs(gaussian).max())
    n = 2**bits - 1
    # 3e-6 of the range: float32 rounding of 2 * round(v * n) / n - 1, the golden files' tolerance.
    codes = (q / top + 1) / 2 * n
    np.testing.assert_allclose(codes, np.round(codes), atol=3e-6 * n)
    assert len(np.unique(np.round(codes))) <= 2**bits
    assert np.all(q != 0)
    assert np.abs(q).max() == pytest.approx(top, rel=1e-6)
    np.testing.assert_allclose(uniform.dorefa_weight(-gaussian, bits), -q, atol=2 * top / n * 1.0001)


def test_weight_levels_in_use_at_8_bits_as_in_the_release() -> None:
    # The specification counts 211 of 256 levels on a Gaussian tensor of 64x32x3x3; the count depends on the seed.
    w = jnp.asarray(np.random.RandomState(1).normal(0, 0.1, (3, 3, 32, 64)), jnp.float32)
    assert 190 <= len(np.unique(np.round(np.asarray(uniform.dorefa_weight(w, 8)), 6))) <= 230


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_weight_becomes_plus_range_over_n(bits: int) -> None:
    q = uniform.dorefa_weight(jnp.array([0.0, 0.3, -0.2], jnp.float32), bits)
    np.testing.assert_allclose(q[0], np.tanh(0.3) / (2**bits - 1), atol=3e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_gradient_is_one_minus_tanh_squared(gaussian, bits: int) -> None:
    cotangent = jnp.ones_like(gaussian)
    gradient = jax.vjp(lambda w: uniform.dorefa_weight(w, bits), gaussian)[1](cotangent)[0]
    np.testing.assert_allclose(gradient, 1 - np.tanh(np.asarray(gaussian)) ** 2, atol=1e-6)


def test_integer_levels_round_to_multiples_of_the_mean_magnitude(gaussian) -> None:
    q, scale = np.asarray(uniform.integer_levels_weight(gaussian)), np.abs(gaussian).mean()
    codes = q / scale
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
    assert np.all(np.abs(q - gaussian) <= scale / 2 * 1.0001)
    clear = np.abs(np.abs(gaussian) - scale / 2) > 1e-5 * scale
    np.testing.assert_array_equal((q == 0)[clear], (np.abs(gaussian) < scale / 2)[clear])
    # It is not binary: the specification found 12 levels on 18k Gaussian weights.
    assert len(np.unique(np.round(codes))) > 4


def test_integer_levels_are_scale_equivariant(gaussian) -> None:
    # A power of two scales without rounding, so the two sides have equal bits.
    np.testing.assert_array_equal(
        uniform.integer_levels_weight(4 * gaussian), 4 * uniform.integer_levels_weight(gaussian)
    )


def test_integer_levels_of_uniform_weights_are_minus_two_to_two() -> None:
    w = np.random.RandomState(2).uniform(-0.1, 0.1, (3, 3, 16, 16)).astype(np.float32)
    codes = np.round(np.asarray(uniform.integer_levels_weight(jnp.asarray(w))) / np.abs(w).mean())
    assert set(codes.ravel()) == {-2, -1, 0, 1, 2}


def test_sign_weight_has_two_levels_and_plus_at_zero() -> None:
    q = uniform.sign_weight(jnp.array([0.0, -0.0, 3.0, -1.0], jnp.float32))
    np.testing.assert_array_equal(q, [1, 1, 1, -1])


@pytest.mark.parametrize("function", [uniform.sign_weight, uniform.integer_levels_weight])
def test_one_bit_gradient_is_the_cotangent_without_clipping(function) -> None:
    w = jnp.array([-5.0, -0.1, 0.0, 0.1, 5.0])
    cotangent = jnp.arange(1.0, 6.0)
    np.testing.assert_array_equal(jax.vjp(function, w)[1](cotangent)[0], cotangent)


@pytest.mark.parametrize(
    ("function", "gradient"),
    # With a range of 0 the DoReFa weight is the constant 0; the 1-bit rules pass the cotangent as always.
    [(lambda w: uniform.dorefa_weight(w, 4), 0), (uniform.sign_weight, 1), (uniform.integer_levels_weight, 1)],
    ids=["dorefa", "sign", "integer_levels"],
)
def test_a_tensor_of_zeros_stays_zero_with_a_finite_gradient(function, gradient: float) -> None:
    q, pullback = jax.vjp(function, jnp.zeros((3, 3, 8, 20)))
    np.testing.assert_array_equal(q, 0)
    np.testing.assert_array_equal(pullback(jnp.ones((3, 3, 8, 20)))[0], gradient)


def test_one_bit_activation_switches_at_one_half_upwards() -> None:
    x = jnp.array([-3.0, 0.0, 0.4999, 0.5, 0.5001, 1.0, 5.0])
    np.testing.assert_array_equal(uniform.dorefa_activation(x, 1), [0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("bits", range(2, 9))
def test_activation_ties_go_to_the_even_level(bits: int) -> None:
    n = 2**bits - 1
    # Only ties that float32 hits exactly are ties: (i + 1/2) / n * n can fall an ulp beside.
    ties = (np.arange(n, dtype=np.float32) + np.float32(0.5)) / np.float32(n)
    ties = ties[ties * np.float32(n) % 1 == 0.5]
    assert ties.size
    codes = np.round(np.asarray(uniform.dorefa_activation(jnp.asarray(ties), bits)) * n)
    np.testing.assert_array_equal(codes % 2, 0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_activation_gradient_passes_inside_the_unit_interval_only(bits: int) -> None:
    # Exactly 1 is left out: what happens there is a convention of the framework's version (specification, section 2.2).
    x = jnp.array([-1.0, -1e-6, 1e-6, 0.3, 0.5, 1 - 1e-6, 1 + 1e-6, 4.0])
    gradient = jax.vjp(lambda x: uniform.dorefa_activation(x, bits), x)[1](jnp.full(8, 2.0))[0]
    np.testing.assert_array_equal(gradient, [0, 0, 2, 2, 2, 2, 0, 0])
