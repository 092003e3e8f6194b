import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.ops.clipping import step_fraction
from bnn_jax.quantizers import QuantContext
from bnn_jax.quantizers.branch_clip import PUBLISHED_DECAYS, BranchClipAct

BOUNDS = jnp.arange(1.0, 8.0)


def apply(x, choice, bounds=BOUNDS, **options):
    quantizer = BranchClipAct(bits=2, **options)
    return quantizer.apply({"params": {"upper_bound": bounds}}, x, QuantContext(choice=jnp.asarray(choice)))


def test_the_step_is_the_published_constant_a_little_below_one_over_the_levels():
    assert [f"{step_fraction(bits):.8f}" for bits in (1, 2, 3, 4)] == [
        "1.00000000", "0.33333331", "0.14285713", "0.06666666"
    ]  # fmt: skip
    assert step_fraction(8) == np.float32(1 / 255)


def test_the_choice_at_the_layers_own_index_clips():
    x = jnp.full((1, 1, 1, 1), 100.0)
    for branch in range(7):
        y = apply(x, [0, branch, 0], index=1)
        # The largest level is below the clip value by up to two ulps.
        np.testing.assert_allclose(y, branch + 1, rtol=2.4e-7)


def test_every_branch_takes_four_levels_at_two_bits():
    x = jnp.linspace(-1, 9, 1000).reshape(1, 10, 10, 10)
    levels = np.unique(apply(x, [2]))
    np.testing.assert_allclose(levels, [0, 1, 2, 3], rtol=2.4e-7)


def test_only_the_chosen_clip_value_gets_a_gradient_and_only_from_what_lies_above_it():
    x = jnp.array([0.5, 2.9, 3.0, 3.1, 5.0]).reshape(1, 1, 1, 5)
    gradient = jax.grad(lambda bounds: apply(x, [2], bounds).sum())(BOUNDS)
    assert gradient.tolist() == [0, 0, 2, 0, 0, 0, 0]


def test_a_clip_value_of_zero_or_less_gives_zeros_and_finite_gradients():
    x = jnp.array([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    for bound in (0.0, -0.5):
        bounds = jnp.full(7, bound)
        assert not np.any(apply(x, [0], bounds))
        assert np.all(np.isfinite(jax.grad(lambda b: apply(x, [0], b).sum())(bounds)))


def test_without_branches_the_clip_value_is_a_scalar():
    shape = BranchClipAct(bits=2, branches=1).init(jax.random.key(0), jnp.zeros((1, 1, 1, 1)), QuantContext())
    assert shape["params"]["upper_bound"].shape == ()
    seven = BranchClipAct(bits=2).init(jax.random.key(0), jnp.zeros((1, 1, 1, 1)), QuantContext())
    assert seven["params"]["upper_bound"].tolist() == [6.0] * len(PUBLISHED_DECAYS)


def test_no_branches_are_refused():
    with pytest.raises(ValueError, match="branches=0: accepted is 1 or more"):
        BranchClipAct(bits=2, branches=0)
