"""The facts of the Weight Search specification, section 5, about the choice itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bnn_jax.ops import categorical

VALUE_LISTS = [(-1.0, 1.0), (-1.0, -0.5, 0.5, 1.0), (-0.25, -0.5, -1.0, -2.0, 2.0, 1.0, 0.5, 0.25), (0.3, -0.1, 0.2)]
TEMPERATURES = (1.0, 0.5, 0.1, 0.02)
each_list = pytest.mark.parametrize("values", VALUE_LISTS, ids=lambda values: f"K={len(values)}")
each_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def draw(count: int, seed: int, shape: tuple[int, ...] = (3, 3, 4, 5)) -> tuple[jax.Array, jax.Array]:
    """Scores (K, ...) with no two of a weight closer than 2**-10, and a cotangent."""
    random = np.random.RandomState(seed)
    scores = np.round(random.normal(size=(count, *shape)) * 32) / 64
    scores += np.arange(count).reshape(-1, *[1] * len(shape)) / 1024
    return jnp.asarray(scores, jnp.float32), jnp.asarray(random.normal(size=shape), jnp.float32)


def gradient(function, scores, values, temperature, cotangent) -> np.ndarray:
    return np.asarray(jax.vjp(lambda s: function(s, values, temperature), scores)[1](cotangent)[0])


def softmax64(scores: jax.Array, temperature: float) -> np.ndarray:
    s = np.asarray(scores, np.float64) / temperature
    e = np.exp(s - s.max(axis=0))
    return e / e.sum(axis=0)


def candidates(values: tuple[float, ...], ndim: int) -> np.ndarray:
    return np.asarray(values).reshape(-1, *[1] * ndim)


@each_list
@each_temperature
def test_the_hard_choice_is_exactly_the_candidate_of_the_highest_score(values, temperature):
    scores, _ = draw(len(values), 0)
    for function in (categorical.hard_choice, jax.jit(categorical.hard_choice, static_argnums=1)):
        w = function(scores, values, temperature)
        np.testing.assert_array_equal(w, np.float32(values)[np.argmax(scores, axis=0)])
    np.testing.assert_array_equal(categorical.chosen_index(scores), np.argmax(scores, axis=0))


@each_list
def test_a_tie_goes_to_the_earlier_candidate(values):
    scores = jnp.zeros((len(values), 6))
    np.testing.assert_array_equal(categorical.hard_choice(scores, values, 1.0), np.float32(values[0]))
    np.testing.assert_array_equal(categorical.chosen_index(scores), 0)
    later = scores.at[1:].set(1.0)
    np.testing.assert_array_equal(categorical.hard_choice(later, values, 1.0), np.float32(values[1]))


@each_list
def test_a_constant_added_to_the_scores_of_a_weight_changes_nothing(values):
    scores, cotangent = draw(len(values), 1)
    # A power of two moves no score to another one's place in float32.
    shift = jnp.where(cotangent > 0, 4.0, -2.0)[None]
    for function in (categorical.hard_choice, categorical.soft_choice):
        one, other = (function(s, values, 0.5) for s in (scores, scores + shift))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(*(categorical.hard_choice(s, values, 0.5) for s in (scores, scores + shift)))


@each_list
@each_temperature
def test_the_gradient_is_that_of_the_tempered_expectation(values, temperature):
    scores, cotangent = draw(len(values), 2)
    p, v = softmax64(scores, temperature), candidates(values, 4)
    expected = np.asarray(cotangent) / temperature * p * (v - (p * v).sum(axis=0))
    found = gradient(categorical.hard_choice, scores, values, temperature, cotangent)
    # The golden files' tolerance of gradients.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found.sum(axis=0), 0, atol=1e-6 * np.abs(expected).max() * len(values))


@each_list
@each_temperature
def test_the_gradient_does_not_depend_on_the_mode(values, temperature):
    scores, cotangent = draw(len(values), 3)
    hard, soft = (
        gradient(function, scores, values, temperature, cotangent) for function in categorical.CHOICES.values()
    )
    np.testing.assert_array_equal(hard, soft)


@each_list
def test_the_soft_choice_is_the_expectation_and_passes_finite_differences(values):
    with jax.enable_x64(True):
        random = np.random.RandomState(4)
        scores = jnp.asarray(random.normal(size=(len(values), 2, 3)))
        np.testing.assert_allclose(
            categorical.soft_choice(scores, values, 0.7),
            (softmax64(scores, 0.7) * candidates(values, 2)).sum(axis=0),
            rtol=1e-12,
        )
        check_grads(lambda s: categorical.soft_choice(s, values, 0.7), (scores,), 1, modes=("rev",))


@each_list
def test_the_hard_choice_is_constant_between_its_switches(values):
    scores, _ = draw(len(values), 5)
    # Below half of the smallest difference of two scores, 2**-10.
    nudge = jnp.asarray(np.random.RandomState(6).uniform(-1, 1, scores.shape) * 2.0**-12, jnp.float32)
    np.testing.assert_array_equal(*(categorical.hard_choice(s, values, 1.0) for s in (scores, scores + nudge)))


def test_permuting_the_candidates_permutes_the_gradient_and_leaves_the_choice():
    values = VALUE_LISTS[1]
    scores, cotangent = draw(4, 7)
    w, g = (
        categorical.hard_choice(scores, values, 0.3),
        gradient(categorical.hard_choice, scores, values, 0.3, cotangent),
    )
    for order in itertools.permutations(range(4)):
        moved, names = scores[jnp.asarray(order)], tuple(values[k] for k in order)
        np.testing.assert_array_equal(categorical.hard_choice(moved, names, 0.3), w)
        found = gradient(categorical.hard_choice, moved, names, 0.3, cotangent)
        # The sums run in another order.
        np.testing.assert_allclose(found, g[list(order)], atol=1e-6)


def test_scaling_the_candidates_scales_choice_and_gradient():
    values = VALUE_LISTS[2]
    scores, cotangent = draw(8, 8)
    # A power of two: exact.
    scaled = tuple(4 * value for value in values)
    for function in (categorical.hard_choice, categorical.soft_choice):
        np.testing.assert_array_equal(function(scores, scaled, 0.5), 4 * function(scores, values, 0.5))
        one, other = (gradient(function, scores, v, 0.5, cotangent) for v in (values, scaled))
        np.testing.assert_array_equal(other, 4 * one)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.05])
def test_two_values_are_a_binary_weight_with_a_tanh_window(temperature):
    gap = jnp.linspace(-2.0, 2.0, 41)
    scores = jnp.stack([-gap / 2, gap / 2])
    found = gradient(categorical.hard_choice, scores, (-1.0, 1.0), temperature, jnp.ones(41))
    slope = 1 / np.cosh(np.asarray(gap, np.float64) / (2 * temperature)) ** 2 / (2 * temperature)
    np.testing.assert_allclose(found, np.stack([-slope, slope]), atol=1e-5 / temperature)


def test_the_gradient_vanishes_as_the_temperature_falls_and_approaches_the_centred_values_as_it_rises():
    values = VALUE_LISTS[1]
    scores, cotangent = draw(4, 9)
    cold = gradient(categorical.hard_choice, scores, values, 2.0**-17, cotangent)
    # The smallest gap, 2**-10, is 128 temperatures: exp(-128) is 0 beside 2**17.
    assert np.abs(cold).max() < 1e-30
    hot = 1e4 * gradient(categorical.hard_choice, scores, values, 1e4, cotangent)
    limit = np.asarray(cotangent) / 4 * (candidates(values, 4) - np.mean(values))
    np.testing.assert_allclose(hot, limit, atol=1e-3)


@each_list
def test_the_scores_are_the_only_residual(values):
    scores, _ = draw(len(values), 10)
    for function in categorical.CHOICES.values():
        _, pullback = jax.vjp(lambda s, t, f=function: f(s, values, t), scores, jnp.float32(0.5))
        kept = sorted(leaf.size for leaf in jax.tree.leaves(pullback))
        assert kept == [1, scores.size]


def test_another_temperature_compiles_nothing():
    scores, cotangent = draw(4, 11)
    values = VALUE_LISTS[1]
    step = jax.jit(lambda s, t: jax.vjp(lambda s: categorical.hard_choice(s, values, t), s)[1](cotangent)[0])
    for temperature in TEMPERATURES:
        step(scores, jnp.float32(temperature))
    assert step._cache_size() == 1


def test_the_temperature_gets_no_gradient():
    scores, cotangent = draw(4, 12)
    values = VALUE_LISTS[1]
    pullback = jax.vjp(lambda t: categorical.hard_choice(scores, values, t), jnp.float32(0.5))[1]
    assert float(pullback(cotangent)[0]) == 0


@each_temperature
def test_probabilities_are_the_tempered_softmax(temperature):
    scores, _ = draw(4, 13)
    # 2e-6, as the golden files: the exponent's rounding.
    np.testing.assert_allclose(
        categorical.probabilities(scores, temperature), softmax64(scores, temperature), rtol=0, atol=2e-6
    )


def test_noise_of_factor_1_samples_from_the_softmax():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    noise = jax.random.gumbel(jax.random.key(0), (3, 20_000))
    index = categorical.chosen_index(categorical.with_noise(logits[:, None], noise, 1.0))
    # Three standard errors of a share near one half among 20,000 draws: 0.011.
    np.testing.assert_allclose(np.bincount(index) / 20_000, [0.5, 0.3, 0.2], atol=0.011)


def test_two_logits_under_sgd_move_as_their_difference():
    # Specification, 5.7: exact in real arithmetic, so float64 shows it to rounding.
    with jax.enable_x64(True):
        random = np.random.RandomState(14)
        pair = jnp.asarray(random.normal(size=(2, 50)))
        difference, buffers = pair[1] - pair[0], (jnp.zeros_like(pair), jnp.zeros(50))
        for step in range(20):
            cotangent, temperature = jnp.asarray(random.normal(size=50)), 0.9**step
            g = jnp.asarray(gradient(categorical.hard_choice, pair, (-1.0, 1.0), temperature, cotangent))
            of_difference = jnp.stack([jnp.zeros(50), difference])
            h = gradient(categorical.hard_choice, of_difference, (-1.0, 1.0), temperature, cotangent)
            h = jnp.asarray(h[1] - h[0])
            buffers = (0.9 * buffers[0] + g + 1e-2 * pair, 0.9 * buffers[1] + h + 1e-2 * difference)
            pair, difference = pair - 0.1 * buffers[0], difference - 0.1 * buffers[1]
        np.testing.assert_allclose(pair[1] - pair[0], difference, rtol=1e-10, atol=1e-12)
