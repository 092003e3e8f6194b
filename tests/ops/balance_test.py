import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.ops.balance import power_of_two_scale, standardize

SHAPES = [(3, 3, 4, 6), (1, 1, 5, 3), (12, 10)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Filters of different mean and spread, the odd ones with heavy tails."""
    rng = np.random.RandomState(seed)
    tails = rng.standard_t(1.5, shape) ** 3
    w = np.where(np.arange(shape[-1]) % 2 == 1, tails, rng.normal(size=shape))
    return (w * rng.uniform(0.01, 10, shape[-1]) + rng.normal(size=shape[-1])).astype(np.float32)


def by_filter(w) -> np.ndarray:
    return np.asarray(w, np.float64).reshape(-1, np.shape(w)[-1])


@each_shape
def test_every_filter_has_mean_0_and_unbiased_deviation_1(shape) -> None:
    filters = by_filter(standardize(jnp.asarray(weights(shape))))
    # Sums of at most 36 numbers of about 1 in float32, relative to a mean of the size of the deviation.
    np.testing.assert_allclose(filters.mean(axis=0), 0, atol=3e-6)
    np.testing.assert_allclose(filters.std(axis=0, ddof=1), 1, rtol=1e-5)


@each_shape
def test_standardized_weights_follow_the_definition(shape) -> None:
    w = by_filter(weights(shape))
    expected = (w - w.mean(axis=0)) / w.std(axis=0, ddof=1)
    np.testing.assert_allclose(by_filter(standardize(jnp.asarray(weights(shape)))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("factor", "shift"), [(2.0, 0.0), (0.125, 0.0), (1.0, 3.0), (4.0, -8.0)])
def test_a_positive_factor_and_a_shift_of_a_filter_change_nothing(factor: float, shift: float) -> None:
    w = jnp.asarray(np.random.RandomState(0).normal(size=(3, 3, 4, 6)), jnp.float32)
    # The shift costs digits of the differences: 8 against values of 4.
    np.testing.assert_allclose(standardize(factor * w + shift), standardize(w), atol=1e-5)


@each_shape
def test_the_gradient_is_orthogonal_to_ones_and_to_the_centred_weights(shape) -> None:
    w = jnp.asarray(weights(shape))
    cotangent = jnp.asarray(np.random.RandomState(1).normal(size=shape), jnp.float32)
    gradient = by_filter(jax.vjp(standardize, w)[1](cotangent)[0])
    centred = by_filter(w) - by_filter(w).mean(axis=0)
    sizes = np.linalg.norm(gradient, axis=0)
    # Relative to the lengths of both vectors: rounding of float32 over at most 36 terms.
    np.testing.assert_allclose(gradient.sum(axis=0) / sizes, 0, atol=2e-5)
    cosines = (gradient * centred).sum(axis=0) / sizes / np.linalg.norm(centred, axis=0)
    np.testing.assert_allclose(cosines, 0, atol=2e-5)


def test_the_gradient_goes_through_mean_and_deviation() -> None:
    w = np.random.RandomState(2).normal(size=(3, 3, 2, 1)).astype(np.float32)
    cotangent = np.random.RandomState(3).normal(size=w.shape)
    gradient = jax.vjp(standardize, jnp.asarray(w))[1](jnp.asarray(cotangent, jnp.float32))[0]

    def value(w: np.ndarray) -> float:
        return float(np.sum(cotangent * (w - w.mean()) / w.std(ddof=1)))

    wide, step = w.astype(np.float64), 1e-6
    differences = [
        (value(wide + step * unit.reshape(w.shape)) - value(wide - step * unit.reshape(w.shape))) / (2 * step)
        for unit in np.eye(w.size)
    ]
    # Central differences in float64 are good to 1e-9; the gradient is float32.
    np.testing.assert_allclose(np.ravel(gradient), differences, rtol=1e-4, atol=1e-5)


def test_a_constant_filter_becomes_0_with_a_finite_gradient() -> None:
    w = jnp.zeros((3, 3, 2, 2)).at[..., 1].set(jnp.asarray(np.random.RandomState(0).normal(size=(3, 3, 2))))
    value, gradient = jax.value_and_grad(lambda w: jnp.sum(standardize(w) ** 3))(w)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(standardize(w)[..., 0], 0)


@pytest.mark.parametrize(
    ("mean_magnitude", "scale"),
    [
        (0.798, 1.0),  # a normal law
        (0.7072, 1.0),  # just above 2**-0.5
        (0.7070, 0.5),
        (0.3536, 0.5),  # just above 2**-1.5
        (0.3535, 0.25),
        (0.1, 0.125),
        (3.0, 4.0),
        (0.0, 1.0),
    ],
)
def test_the_scale_is_the_power_of_two_next_to_the_mean_magnitude(mean_magnitude: float, scale: float) -> None:
    w = jnp.stack([jnp.full((3, 3, 2), mean_magnitude), -jnp.full((3, 3, 2), mean_magnitude)], axis=-1)
    np.testing.assert_array_equal(power_of_two_scale(w), [scale, scale])


def test_the_scale_of_standardized_weights_is_at_most_1() -> None:
    scales = np.asarray(power_of_two_scale(standardize(jnp.asarray(weights((3, 3, 40, 200))))))
    assert scales.max() == 1.0
    assert len(np.unique(scales)) > 1
    np.testing.assert_array_equal(np.log2(scales), np.round(np.log2(scales)))


def test_the_scale_has_no_gradient() -> None:
    w = jnp.asarray(weights((3, 3, 2, 4)))
    np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(power_of_two_scale(w)))(w), 0)
