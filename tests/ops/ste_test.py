import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.ops import ste

ROUNDING = {
    # function: (x, y) with every tie and sign of interest.
    ste.round_half_even: [(0.5, 0.0), (1.5, 2.0), (2.5, 2.0), (-0.5, 0.0), (-1.5, -2.0), (0.49, 0.0), (0.51, 1.0)],
    ste.round_half_away: [(0.5, 1.0), (1.5, 2.0), (2.5, 3.0), (-0.5, -1.0), (-2.5, -3.0), (0.0, 0.0), (0.49, 0.0)],
    ste.sign_positive_zero: [(0.0, 1.0), (-0.0, 1.0), (1e-30, 1.0), (-1e-30, -1.0), (7.0, 1.0), (-7.0, -1.0)],
    ste.sign: [(0.0, 0.0), (-0.0, 0.0), (1e-30, 1.0), (-1e-30, -1.0), (7.0, 1.0), (-7.0, -1.0)],
}


def id_of(function) -> str:
    return function.__name__


@pytest.mark.parametrize("function", ROUNDING, ids=id_of)
def test_values_at_ties_and_zero(function) -> None:
    x, y = np.array(ROUNDING[function], np.float32).T
    np.testing.assert_array_equal(function(jnp.array(x)), y)


@pytest.mark.parametrize("function", ROUNDING, ids=id_of)
def test_straight_through_gradient_is_the_cotangent_everywhere(function) -> None:
    x = jnp.array([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0])
    cotangent = jnp.arange(1.0, 8.0)
    np.testing.assert_array_equal(jax.vjp(function, x)[1](cotangent)[0], cotangent)


@pytest.mark.parametrize("function", ROUNDING, ids=id_of)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_and_shape_are_kept(function, dtype) -> None:
    y = function(jnp.ones((2, 0, 3), dtype))
    assert (y.shape, y.dtype) == ((2, 0, 3), dtype)


def test_straight_through_keeps_the_docstring_of_what_it_wraps() -> None:
    assert "ties to the even one" in (ste.round_half_even.__doc__ or "")


@pytest.mark.parametrize(("function", "top"), [(ste.clip_unit, 1.0), (ste.relu6, 6.0)])
def test_clips_and_blocks_the_gradient_outside_the_open_interval(function, top: float) -> None:
    x = jnp.array([-1.0, 0.0, 1e-6, top / 2, top - 1e-6, top, top + 1.0])
    y, pullback = jax.vjp(function, x)
    np.testing.assert_array_equal(y, np.clip(x, 0.0, top))
    np.testing.assert_array_equal(pullback(jnp.full(7, 3.0))[0], [0, 0, 3, 3, 3, 0, 0])


def test_hard_tanh_blocks_the_gradient_at_and_beyond_its_bounds() -> None:
    x = jnp.array([-2.0, -1.0, -1 + 1e-6, 0.0, 1 - 1e-6, 1.0, 2.0])
    y, pullback = jax.vjp(ste.hard_tanh, x)
    np.testing.assert_array_equal(y, np.clip(x, -1.0, 1.0))
    np.testing.assert_array_equal(pullback(jnp.full(7, 3.0))[0], [0, 0, 3, 3, 3, 0, 0])


@pytest.mark.parametrize(("k", "t"), [(1000.0, 1e-3), (10.0, 0.1), (1.0, 1.0), (1.0, 9.87)])
def test_error_decay_gradient_follows_the_formula(k: float, t: float) -> None:
    x = np.array([-3.0, -1.0, -0.1, 0.0, 1e-4, 0.5, 2.0], np.float32)
    cotangent = np.arange(1.0, 8.0, dtype=np.float32)
    y, pullback = jax.vjp(lambda x: ste.error_decay_sign(x, k, t), jnp.asarray(x))
    np.testing.assert_array_equal(y, np.sign(x))
    expected = cotangent * k * t * (1 - np.tanh(t * x.astype(np.float64)) ** 2)
    # float32: 1 - tanh**2 is good to 3e-7, cotangents are at most 7.
    np.testing.assert_allclose(pullback(jnp.asarray(cotangent))[0], expected, rtol=1e-5, atol=2.1e-6 * k * t)


def test_approx_sign_is_the_sign_with_a_triangle_as_gradient() -> None:
    x = jnp.array([-3.0, -1.0, -0.75, -0.25, 0.0, 0.25, 0.75, 1.0, 3.0])
    y, pullback = jax.vjp(ste.approx_sign, x)
    np.testing.assert_array_equal(y, [-1, -1, -1, -1, 0, 1, 1, 1, 1])
    # Exact: the positions and slopes are sums of powers of two.
    np.testing.assert_array_equal(pullback(jnp.full(9, 3.0))[0], [0, 0, 1.5, 4.5, 6, 4.5, 1.5, 0, 0])


def test_error_decay_parameters_get_no_gradient() -> None:
    x = jnp.array([-0.3, 0.2])
    gradients = jax.grad(lambda k, t: jnp.sum(ste.error_decay_sign(x, k, t) * x), argnums=(0, 1))(2.0, 0.5)
    np.testing.assert_array_equal(gradients, 0)


def test_error_decay_parameters_may_be_traced() -> None:
    def gradient(k, t):
        return jax.grad(lambda x: jnp.sum(ste.error_decay_sign(x, k, t)))(jnp.array([0.0, 1.0]))

    jitted = jax.jit(gradient)
    for k, t in ((10.0, 0.1), (1.0, 3.0)):
        np.testing.assert_allclose(jitted(k, t), gradient(k, t), rtol=1e-5)
    assert jitted._cache_size() == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("function", [lambda x: ste.error_decay_sign(x, 1.0, 2.0), ste.approx_sign])
def test_signs_with_a_slope_keep_the_type(function, dtype) -> None:
    x = jnp.ones(3, dtype)
    y, pullback = jax.vjp(function, x)
    assert y.dtype == pullback(x)[0].dtype == dtype


@pytest.mark.parametrize(
    "function",
    [*ROUNDING, ste.clip_unit, ste.relu6, ste.hard_tanh, ste.approx_sign],
    ids=lambda function: function.__name__,
)
def test_the_rules_hold_under_jit_and_vmap(function) -> None:
    x = jnp.linspace(-2.0, 8.0, 24).reshape(4, 6)

    def total(x):
        return jnp.sum(function(x) * x)

    expected = jax.grad(total)(x)
    # Equal bits: one operation per element, nothing to reassociate.
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(total)))(x), expected)
