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


@pytest.mark.parametrize("function", [*ROUNDING, ste.clip_unit, ste.relu6], ids=lambda function: function.__name__)
def test_the_rules_hold_under_jit_and_vmap(function) -> None:
    x = jnp.linspace(-2.0, 8.0, 24).reshape(4, 6)

    def total(x):
        return jnp.sum(function(x) * x)

    expected = jax.grad(total)(x)
    # Equal bits: one operation per element, nothing to reassociate.
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(total)))(x), expected)
