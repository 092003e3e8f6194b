"""Formulas of the IR-Net quantizers; what every quantizer has to satisfy is in battery_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import QuantContext, build_act, build_weight
from bnn_jax.stages import spec

SHAPE = (3, 3, 4, 6)


def weights(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(0.1, 0.3, SHAPE), jnp.float32)


def knobs(k: float, t: float) -> QuantContext:
    return QuantContext(train=True, knobs={"error_decay_k": jnp.float32(k), "error_decay_t": jnp.float32(t)})


def quantize(w: jax.Array, ctx: QuantContext) -> jax.Array:
    return build_weight(spec("irnet"))().apply({}, w, ctx)


def test_weights_are_the_sign_of_the_centred_filter_times_a_power_of_two() -> None:
    w = np.asarray(weights(), np.float64)
    centred = w - w.mean(axis=(0, 1, 2))
    magnitude = np.abs(centred / centred.std(axis=(0, 1, 2), ddof=1)).mean(axis=(0, 1, 2))
    expected = np.sign(centred) * 2.0 ** np.round(np.log2(magnitude))
    np.testing.assert_array_equal(quantize(weights(), QuantContext()), expected)


@pytest.mark.parametrize(("k", "t"), [(1000.0, 1e-3), (10.0, 0.1), (1.0, 5.0)])
def test_the_gradient_follows_the_formula(k: float, t: float) -> None:
    w = np.asarray(weights(), np.float64).reshape(-1, SHAPE[-1])
    cotangent = np.random.RandomState(1).normal(size=SHAPE)
    gradient = jax.vjp(lambda w: quantize(w, knobs(k, t)), weights())[1](jnp.asarray(cotangent, jnp.float32))[0]
    n, deviation = w.shape[0], w.std(axis=0, ddof=1)
    w2 = (w - w.mean(axis=0)) / deviation
    scale = 2.0 ** np.round(np.log2(np.abs(w2).mean(axis=0)))
    g = scale * cotangent.reshape(w.shape) * k * t * (1 - np.tanh(t * w2) ** 2)
    # Derivative of (w - mean) / std with an unbiased standard deviation.
    expected = (g - g.mean(axis=0) - w2 * (g * w2).sum(axis=0) / (n - 1)) / deviation
    # float32 against float64, over sums of 36 terms.
    np.testing.assert_allclose(np.reshape(gradient, w.shape), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_filter_is_orthogonal_to_ones_and_to_its_centred_weights() -> None:
    w, cotangent = weights(2), jnp.asarray(np.random.RandomState(3).normal(size=SHAPE), jnp.float32)
    gradient = np.asarray(jax.vjp(lambda w: quantize(w, knobs(1.0, 3.0)), w)[1](cotangent)[0], np.float64)
    centred = np.asarray(w, np.float64) - np.asarray(w, np.float64).mean(axis=(0, 1, 2))
    length = np.sqrt((gradient**2).sum(axis=(0, 1, 2)))
    assert length.min() > 0
    # Rounding of float32, relative to the lengths.
    np.testing.assert_allclose(gradient.sum(axis=(0, 1, 2)) / length, 0, atol=2e-5)
    products = (gradient * centred).sum(axis=(0, 1, 2))
    np.testing.assert_allclose(products / length / np.sqrt((centred**2).sum(axis=(0, 1, 2))), 0, atol=2e-5)


def test_the_knobs_change_the_gradient_and_never_the_value() -> None:
    w, factor = weights(), jnp.sin(jnp.arange(6.0))[None, None, None]
    values, gradients = zip(
        *(
            jax.value_and_grad(lambda w, ctx=ctx: jnp.sum(factor * quantize(w, ctx) * w))(w)
            for ctx in (knobs(10.0, 0.1), knobs(1.0, 8.0), QuantContext())
        ),
        strict=True,
    )
    assert values[0] == values[1] == values[2]
    assert np.abs(gradients[0] - gradients[1]).max() > 0.1
    # Without knobs the published defaults hold: k = 10, t = 0.1.
    np.testing.assert_array_equal(gradients[0], gradients[2])


def test_a_changed_knob_compiles_nothing() -> None:
    gradient = jax.jit(jax.grad(lambda w, ctx: jnp.sum(quantize(w, ctx) * w)))
    for k, t in ((1000.0, 1e-3), (1.0, 4.0)):
        gradient(weights(), knobs(k, t))
    assert gradient._cache_size() == 1


@pytest.mark.parametrize(("factor", "shift"), [(2.0, 0.0), (0.25, 0.0), (1.0, 0.5), (4.0, -1.0)])
def test_a_positive_factor_and_a_shift_of_the_weights_change_nothing(factor: float, shift: float) -> None:
    w = weights(4)
    np.testing.assert_array_equal(quantize(factor * w + shift, QuantContext()), quantize(w, QuantContext()))


def test_the_real_view_is_the_standardized_kernel_without_scale() -> None:
    real = np.asarray(
        build_weight(spec("irnet"))().apply({}, weights(), QuantContext(), method="real_kernel"), np.float64
    )
    np.testing.assert_allclose(real.mean(axis=(0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(real.std(axis=(0, 1, 2), ddof=1), 1, rtol=1e-5)


def test_the_plain_sign_keeps_the_raw_weights_as_its_real_view() -> None:
    module = build_weight(spec("sign"))()
    np.testing.assert_array_equal(module.apply({}, weights(), QuantContext(), method="real_kernel"), weights())
    np.testing.assert_array_equal(module.apply({}, weights(), QuantContext()), np.sign(weights()))


def test_activations_follow_the_error_decay_estimator() -> None:
    x = jnp.array([[-2.0, -0.3, 0.0, 0.3, 2.0]])
    module = build_act(spec("irnet"))()
    y, pullback = jax.vjp(lambda x: module.apply({}, x, knobs(1.0, 2.0)), x)
    np.testing.assert_array_equal(y, [[-1, -1, 0, 1, 1]])
    expected = 2 * (1 - np.tanh(2 * np.asarray(x, np.float64)) ** 2)
    # float32: 1 - tanh**2 is good to 3e-7.
    np.testing.assert_allclose(pullback(jnp.ones_like(x))[0], expected, rtol=1e-5, atol=6e-7)
