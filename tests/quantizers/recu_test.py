"""ReCU's formulas against NumPy in float64, and what its knob changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import schedules
from bnn_jax.ops.clipping import rectified_clamp
from bnn_jax.quantizers import QuantContext, build_act, build_weight
from bnn_jax.stages import spec


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(0.1, 1.0, shape), jnp.float32)


def context(quantile: float) -> QuantContext:
    return QuantContext(train=True, knobs={"clamp_quantile": jnp.float32(quantile)})


def quantile_of(w: np.ndarray, tau: float) -> float:
    """tau-quantile of the Laplace distribution around 0 whose scale is that of the weights."""
    return -np.abs(w).mean() * np.log(2 - 2 * tau)


@pytest.mark.parametrize("tau", [0.5, 0.85, 0.99])
def test_weights_are_clamped_to_the_quantile_of_a_laplace_distribution(tau):
    w, cotangent = normal(3, 3, 4, 5), normal(3, 3, 4, 5, seed=1)
    value, pullback = jax.vjp(lambda w: rectified_clamp(w, tau), w)
    exact = np.asarray(w, np.float64)
    limit = quantile_of(exact, tau)
    # 1e-6 of the limit: rounding of the mean, and of the logarithm's argument near 0.
    np.testing.assert_allclose(value, np.clip(exact, -limit, limit), atol=3e-6 * max(limit, 1))
    np.testing.assert_array_equal(pullback(cotangent)[0], np.where(np.abs(exact) < limit, cotangent, 0))


def test_a_sample_of_a_laplace_distribution_has_that_share_outside():
    w = np.random.RandomState(0).laplace(0, 0.3, (3, 3, 64, 64)).astype(np.float32)
    clamped = np.abs(rectified_clamp(jnp.asarray(w), 0.85)) >= quantile_of(w, 0.85) * 0.9999
    # A share of 2 (1 - tau) of 36,864 weights, within five standard deviations.
    assert np.mean(clamped) == pytest.approx(0.3, abs=0.012)


def test_the_gradient_of_the_weights_passes_the_clamp_and_the_standardisation():
    w, cotangent = normal(3, 3, 4, 5), normal(3, 3, 4, 5, seed=1)
    module = build_weight(spec("recu"))()
    variables = module.init(jax.random.key(0), w, QuantContext())
    alpha = np.asarray(variables["params"]["scale"], np.float64)
    value, pullback = jax.vjp(lambda v, w: module.apply(v, w, context(0.85)), variables, w)
    by_scale, by_weight = pullback(cotangent)
    exact = np.asarray(w, np.float64).reshape(-1, 5)
    centred, deviation = exact - exact.mean(axis=0), exact.std(axis=0, ddof=1)
    standard = 2 * np.sqrt(2) * centred / deviation
    np.testing.assert_allclose(np.asarray(value).reshape(-1, 5), alpha * np.sign(standard), rtol=1e-6)
    flat = np.asarray(cotangent, np.float64).reshape(-1, 5)
    inner = alpha * flat * (np.abs(standard) < quantile_of(standard, 0.85)) * 2 * np.sqrt(2)
    through_deviation = centred * (inner * centred).sum(axis=0) / (deviation**2 * (len(exact) - 1))
    expected = (inner - inner.mean(axis=0) - through_deviation) / deviation
    # 3e-6: float32 sums over the 36 weights of a filter.
    np.testing.assert_allclose(np.asarray(by_weight).reshape(-1, 5), expected, atol=3e-6)
    np.testing.assert_allclose(by_scale["params"]["scale"], (flat * np.sign(standard)).sum(axis=0), rtol=1e-5)


def test_the_knob_changes_the_gradient_and_never_the_value():
    w, module = normal(3, 3, 4, 5), build_weight(spec("recu"))()
    variables = module.init(jax.random.key(0), w, QuantContext())
    found = [jax.vjp(lambda w, tau=tau: module.apply(variables, w, context(tau)), w) for tau in (0.7, 0.95)]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    gradients = [pullback(normal(3, 3, 4, 5, seed=1))[0] for _, pullback in found]
    assert (gradients[0] != gradients[1]).any()


def test_activations_have_their_gradient_in_training_at_unit_variance():
    x, cotangent, module = 3 * normal(2, 5, 4, 3), normal(2, 5, 4, 3, seed=1), build_act(spec("recu"))()
    value, pullback = jax.vjp(lambda x: module.apply({}, x, QuantContext(train=True)), x)
    np.testing.assert_array_equal(value, np.sign(x))
    np.testing.assert_array_equal(value, module.apply({}, x, QuantContext()))
    for image, given, gradient in zip(np.asarray(x, np.float64), np.asarray(cotangent), pullback(cotangent)[0]):
        deviation = np.sqrt(image.var(ddof=1) + 1e-5)
        inner = given * np.maximum(0, 2 - 2 * np.abs(image / deviation))
        through = (inner * image).sum() * (image - image.mean()) / (image.size - 1) / deviation**3
        # 3e-6: float32 sums over the 60 values of an image.
        np.testing.assert_allclose(gradient, inner / deviation - through, atol=3e-6)


def test_the_quantile_rises_exponentially_from_epoch_to_epoch():
    tau = schedules.build(spec("exponential_by_epoch", initial=0.85, final=0.99), steps_per_epoch=3, epochs=10)
    values = [float(tau(jnp.int32(step))) for step in range(30)]
    slope = 0.14 / (np.e - 1)
    np.testing.assert_allclose(values[::3], [slope * np.exp(e / 10) + 0.85 - slope for e in range(10)], rtol=1e-6)
    assert values[::3] == values[2::3]
