import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import QuantContext, build_act, build_weight
from bnn_jax.quantizers.lsq import LsqAct, LsqWeight
from bnn_jax.stages import spec

KEY = jax.random.key(0)


def random(shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).normal(0, 0.3, shape), jnp.float32)


@pytest.mark.parametrize(("bits", "levels"), [(2, 3), (3, 7), (4, 15)])
def test_weights_of_every_filter_take_symmetric_levels(bits, levels):
    w, step = jnp.linspace(-4, 4, 180).reshape(3, 3, 10, 2), jnp.array([0.5, 0.25])
    codes = LsqWeight(bits).apply({"params": {"step": step}}, w, QuantContext()) / step.reshape(1, 1, 1, 2)
    highest = levels // 2
    for channel in range(2):
        assert set(np.asarray(codes[..., channel]).ravel()) == set(range(-highest, highest + 1))


def test_the_first_step_is_twice_the_mean_magnitude_over_the_root_of_the_largest_code():
    w = random((3, 3, 4, 5))
    step = LsqWeight(3).init(KEY, w, QuantContext())["params"]["step"]
    np.testing.assert_allclose(step, 2 * np.abs(w).mean(axis=(0, 1, 2)) / np.sqrt(3), rtol=1e-6)


def test_the_bounds_of_the_range_get_a_gradient_and_what_lies_outside_does_not():
    variables = {"params": {"step": jnp.array([0.5])}}
    w = jnp.array([-0.51, -0.5, -0.1, 0.0, 0.5, 0.51]).reshape(1, 1, 6, 1)
    gradient = jax.grad(lambda w: LsqWeight(2).apply(variables, w, QuantContext()).sum())(w)
    assert gradient.ravel().tolist() == [0, 1, 1, 1, 1, 0]


def test_the_gradient_of_a_step_counts_the_values_of_the_whole_tensor():
    variables = {"params": {"step": jnp.array([0.5, 0.5])}}
    w = jnp.zeros((1, 1, 2, 2)).at[0, 0, 0, 0].set(9.0)
    gradient = jax.grad(lambda v: LsqWeight(2).apply(v, w, QuantContext()).sum())(variables)["params"]["step"]
    np.testing.assert_allclose(gradient, [1 / np.sqrt(4 * 1), 0])


def test_the_pass_that_makes_the_activation_steps_quantizes_with_a_step_of_one():
    x = jnp.abs(random((2, 3, 3, 4))) * 9
    y, variables = LsqAct(2).init_with_output(KEY, x, QuantContext())
    np.testing.assert_array_equal(y, jnp.clip(jnp.round(x), 0, 3))
    np.testing.assert_allclose(variables["params"]["step"], 2 * x.mean(axis=(0, 1, 2)) / np.sqrt(3), rtol=1e-6)
    again = LsqAct(2).apply(variables, x, QuantContext())
    assert not np.allclose(again, y)


def test_padded_rows_count_neither_in_the_first_step_nor_in_its_gradient():
    x, padded = random((3, 2, 2, 4)), random((5, 2, 2, 4), seed=1)
    padded = padded.at[:3].set(x)
    ctx = QuantContext(mask=jnp.arange(5) < 3)
    few, many = (LsqAct(3).init(KEY, *arguments) for arguments in ((x, QuantContext()), (padded, ctx)))
    np.testing.assert_allclose(many["params"]["step"], few["params"]["step"], rtol=1e-6)

    def gradient(x, ctx):
        return jax.grad(lambda v: LsqAct(3).apply(v, x, ctx)[:3].sum())(few)["params"]["step"]

    np.testing.assert_allclose(gradient(padded, ctx), gradient(x, QuantContext()), rtol=1e-5)


@pytest.mark.parametrize("bits", [0, 9, 32, 2.5])
@pytest.mark.parametrize("build", [build_weight, build_act])
def test_other_bit_widths_are_refused(build, bits):
    with pytest.raises(ValueError, match=f"bits={bits!r}: accepted are"):
        build(spec("lsq", bits=bits))()


def test_one_bit_weights_are_refused():
    with pytest.raises(ValueError, match="bits=1: accepted are 2"):
        build_weight(spec("lsq", bits=1))()
