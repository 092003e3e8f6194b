import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import BatchNorm
from bnn_jax.quantizers import QuantContext

TRAIN = QuantContext(train=True)


@pytest.fixture
def x() -> jax.Array:
    return jnp.asarray(np.random.RandomState(0).normal(2.0, 3.0, (4, 3, 5, 6)), jnp.float32)


def train(x: jax.Array, ctx: QuantContext = TRAIN, **options):
    """Output of a training pass of a fresh layer, and its changed running statistics."""
    norm = BatchNorm(**options)
    variables = norm.init(jax.random.key(0), x, ctx)
    return norm.apply(variables, x, ctx, mutable=["batch_stats"])


def test_training_normalises_by_the_biased_batch_variance(x) -> None:
    y, _ = train(x)
    values = np.asarray(x, np.float64)
    expected = (values - values.mean((0, 1, 2))) / np.sqrt(values.var((0, 1, 2)) + 1e-5)
    # Float32 rounding of values of magnitude up to 4.
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_running_statistics_take_a_tenth_of_the_mean_and_of_the_unbiased_variance(x) -> None:
    _, updates = train(x)
    values = np.asarray(x, np.float64)
    stats = updates["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * values.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * values.var((0, 1, 2), ddof=1), rtol=1e-6)
    # 60 values per channel: the biased variance would be off by 1/60, far more than the tolerance.


def test_evaluation_uses_the_running_statistics_scale_and_bias(x) -> None:
    rng = np.random.RandomState(1)
    scale, bias, mean = (rng.normal(size=6).astype(np.float32) for _ in range(3))
    var = rng.uniform(0.5, 2, 6).astype(np.float32)
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
    y, updates = BatchNorm(epsilon=0.1).apply(variables, x, QuantContext(), mutable=["batch_stats"])
    expected = (np.asarray(x, np.float64) - mean) / np.sqrt(var + 0.1) * scale + bias
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert not updates or jax.tree.all(
        jax.tree.map(np.array_equal, dict(updates["batch_stats"]), variables["batch_stats"])
    )


def test_a_masked_batch_equals_the_batch_without_the_padding(x) -> None:
    padded = jnp.concatenate([x, jnp.full((3, *x.shape[1:]), 1e3)])
    mask = jnp.arange(7) < 4
    y, updates = train(padded, TRAIN.replace(mask=mask))
    expected, expected_updates = train(x)
    # The sums run over more (zero) terms in another order: a few ulps.
    np.testing.assert_allclose(y[:4], expected, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected_updates)


def test_the_gradient_does_not_see_masked_rows(x) -> None:
    padded = jnp.concatenate([x, jnp.full((3, *x.shape[1:]), 1e3)])
    mask = jnp.arange(7) < 4
    norm, weight = BatchNorm(), jnp.asarray(np.random.RandomState(2).normal(size=x.shape), jnp.float32)
    variables = norm.init(jax.random.key(0), x, TRAIN)

    def loss(x, ctx):
        return jnp.sum(norm.apply(variables, x, ctx, mutable=["batch_stats"])[0][:4] * weight)

    gradient = jax.grad(loss)(padded, TRAIN.replace(mask=mask))
    np.testing.assert_array_equal(gradient[4:], 0)
    np.testing.assert_allclose(gradient[:4], jax.grad(loss)(x, TRAIN), atol=2e-6)


def test_a_mask_of_all_true_changes_nothing_beyond_rounding(x) -> None:
    y, updates = train(x, TRAIN.replace(mask=jnp.ones(4, bool)))
    expected, expected_updates = train(x)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected_updates)


def test_the_real_stream_uses_batch_statistics_and_leaves_the_running_ones(x) -> None:
    y, updates = train(x, TRAIN.replace(stream="real"))
    np.testing.assert_array_equal(y, train(x)[0])
    np.testing.assert_array_equal(updates["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(updates["batch_stats"]["var"], 1)


def test_initialisation_in_training_mode_leaves_the_running_statistics_at_zero_and_one(x) -> None:
    stats = BatchNorm().init(jax.random.key(0), x, TRAIN)["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], 0)
    np.testing.assert_array_equal(stats["var"], 1)


def test_one_value_per_channel_gives_finite_running_statistics() -> None:
    # n - 1 = 0: the unbiased variance does not exist.
    _, updates = train(jnp.ones((1, 6)))
    assert np.all(np.isfinite(updates["batch_stats"]["var"]))


BRANCHES = 3


def branch_norm(x, ctx, seed=1):
    """A branch norm as second searched layer, with random variables, and the variables."""
    norm = BatchNorm(branches=BRANCHES, index=1)
    random = np.random.RandomState(seed)
    shapes = jax.eval_shape(lambda: norm.init(jax.random.key(0), x, ctx))
    return norm, jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.5, 2, leaf.shape), jnp.float32), shapes)


def row(variables, branch):
    return jax.tree.map(lambda leaf: leaf[branch], variables)


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize("branch", range(BRANCHES))
def test_a_branch_normalises_as_an_ordinary_layer_with_its_row(x, branch, train_mode) -> None:
    ctx = QuantContext(train=train_mode, choice=jnp.array([0, branch]))
    norm, variables = branch_norm(x, ctx)
    y, updates = norm.apply(variables, x, ctx, mutable=["batch_stats"])
    expected, expected_updates = BatchNorm().apply(row(variables, branch), x, ctx, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, row(updates, branch), expected_updates)


def test_the_other_branches_keep_their_statistics_and_get_no_gradient(x) -> None:
    ctx = QuantContext(train=True, choice=jnp.array([0, 2]))
    norm, variables = branch_norm(x, ctx)
    _, updates = norm.apply(variables, x, ctx, mutable=["batch_stats"])

    def loss(params):
        return jnp.sum(norm.apply({**variables, "params": params}, x, ctx, mutable=["batch_stats"])[0] ** 2)

    gradient = jax.grad(loss)(variables["params"])
    for other in (0, 1):
        jax.tree.map(
            np.testing.assert_array_equal, row(updates, other)["batch_stats"], row(variables, other)["batch_stats"]
        )
        assert not any(np.any(leaf[other]) for leaf in jax.tree.leaves(gradient))
    assert all(np.all(leaf[2] != 0) for leaf in jax.tree.leaves(gradient))
