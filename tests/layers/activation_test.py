import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers.activation import LearnableBias, PRelu, RPRelu

X = jnp.asarray(np.random.RandomState(0).normal(size=(2, 3, 4, 5)), jnp.float32)
PER_CHANNEL = jnp.array([-0.5, 0.0, 0.25, 1.0, 2.0])


def test_a_learnable_bias_starts_as_the_identity_and_shifts_each_channel() -> None:
    variables = LearnableBias().init(jax.random.key(0), X)
    np.testing.assert_array_equal(LearnableBias().apply(variables, X), X)
    shifted = LearnableBias().apply({"params": {"bias": PER_CHANNEL}}, X)
    np.testing.assert_array_equal(shifted, np.asarray(X) + np.asarray(PER_CHANNEL))


def test_a_prelu_starts_with_slope_a_quarter() -> None:
    variables = PRelu().init(jax.random.key(0), X)
    np.testing.assert_array_equal(PRelu().apply(variables, X), np.where(X > 0, X, 0.25 * np.asarray(X)))


def test_a_prelu_at_zero_takes_the_slope_of_negative_values() -> None:
    gradient = jax.grad(lambda x: jnp.sum(PRelu().apply({"params": {"slope": PER_CHANNEL}}, x)))
    np.testing.assert_array_equal(gradient(jnp.zeros((1, 5)))[0], PER_CHANNEL)


def test_the_shifts_of_an_rprelu_are_inside_and_outside() -> None:
    shifts = {"input_shift": {"bias": -PER_CHANNEL}, "output_shift": {"bias": 3 * PER_CHANNEL}}
    y = RPRelu().apply({"params": {**shifts, "prelu": {"slope": jnp.full(5, 0.5)}}}, X)
    inside = np.asarray(X) - np.asarray(PER_CHANNEL)
    # Three float32 operations, values of at most 10.
    np.testing.assert_allclose(y, np.where(inside > 0, inside, 0.5 * inside) + 3 * np.asarray(PER_CHANNEL), atol=2e-6)


def test_each_parameter_of_an_rprelu_gets_a_gradient_per_channel() -> None:
    params = RPRelu().init(jax.random.key(0), X)["params"]
    gradients = jax.grad(lambda params: jnp.sum(RPRelu().apply({"params": params}, X) * X))(params)
    assert {leaf.shape for leaf in jax.tree.leaves(gradients)} == {(5,)} and len(jax.tree.leaves(gradients)) == 3
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(gradients))
    totals = np.sum(X, axis=(0, 1, 2))
    # Sums of 24 numbers of about 1.
    np.testing.assert_allclose(gradients["output_shift"]["bias"], totals, atol=1e-5)


@pytest.mark.parametrize("module", [LearnableBias(), PRelu(), RPRelu()], ids=lambda module: type(module).__name__)
def test_dense_inputs_are_accepted(module) -> None:
    y, _ = module.init_with_output(jax.random.key(0), X[0, 0])
    assert y.shape == (4, 5)
