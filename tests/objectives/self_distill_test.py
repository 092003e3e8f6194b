"""Terms of self-distillation against their formulas in NumPy (float64); what all terms share is in battery_test.py."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.objectives import Batch, Outputs
from bnn_jax.objectives.self_distill import Cluster, FeatureSwap, LabelBank
from bnn_jax.quantizers.base import QuantContext

CTX = QuantContext(train=True)
CLASSES = 4
# Sums of a few hundred numbers in float32.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


def random(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(0.2, 1.0, shape), jnp.float32)


def batch_of(labels: Any, mask: Any = None) -> Batch:
    labels = jnp.asarray(labels, jnp.int32)
    mask = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask)
    return Batch(images=jnp.zeros((labels.size, 1, 1, 1)), labels=labels, mask=mask)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ---- features of the two streams


def pair(seed: int = 0, shape: tuple[int, ...] = (3, 4, 5, 6)) -> tuple[jax.Array, jax.Array]:
    return random(shape, seed), random(shape, seed + 1)


def feature_swap(pairs: list[tuple[jax.Array, jax.Array]], compare: str = "channel_and_spatial") -> jax.Array:
    outputs = Outputs(
        logits=jnp.zeros((pairs[0][0].shape[0], CLASSES)),
        features=jnp.zeros((pairs[0][0].shape[0], 2)),
        block_features=tuple(a for a, _ in pairs),
        real_features=tuple(r for _, r in pairs),
    )
    return FeatureSwap(compare=compare)(outputs, batch_of([0] * pairs[0][0].shape[0]), {}, CTX)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected_distance(a: Any, r: Any) -> float:
    a, r = np.asarray(a, np.float64), np.asarray(r, np.float64)
    rows, height, width, channels = a.shape
    channel = unit(a.mean(axis=(1, 2))) - unit(r.mean(axis=(1, 2)))
    spatial = unit(a.mean(axis=3).reshape(rows, -1)) - unit(r.mean(axis=3).reshape(rows, -1))
    return (np.linalg.norm(channel) / channels + np.linalg.norm(spatial) / (height * width)) / rows


def test_the_distance_of_features_follows_the_formula_and_is_averaged_over_the_pairs() -> None:
    pairs = [pair(0), pair(2, (3, 2, 2, 8))]
    expected = np.mean([expected_distance(*each) for each in pairs])
    np.testing.assert_allclose(feature_swap(pairs), expected, **TOLERANCE)


def test_the_elementwise_distance_follows_the_formula() -> None:
    a, r = pair(0, (3, 7))
    expected = 2 * np.linalg.norm(np.asarray(a, np.float64) - np.asarray(r, np.float64)) / (7 * 3)
    np.testing.assert_allclose(feature_swap([(a, r)], "elementwise"), expected, **TOLERANCE)


def test_norms_of_the_binary_features_are_constants_in_the_gradient() -> None:
    a, r = pair()
    gradient = jax.grad(lambda a: feature_swap([(a, r)]))(a)
    wide, real = np.asarray(a, np.float64), np.asarray(r, np.float64)
    rows, height, width, channels = wide.shape

    def value(x: np.ndarray) -> float:
        """The distance of ``x`` with the norms of ``a``."""
        total = 0.0
        for reduce, size in ((lambda y: y.mean(axis=(1, 2)), channels), (lambda y: y.mean(axis=3), height * width)):
            x_vector, a_vector, r_vector = (reduce(y).reshape(rows, -1) for y in (x, wide, real))
            norms = np.linalg.norm(a_vector, axis=-1, keepdims=True)
            total += np.linalg.norm(x_vector / norms - unit(r_vector)) / size / rows
        return total

    step, differences = 1e-6, np.zeros_like(wide)
    for index in np.ndindex(wide.shape):
        moved = np.zeros_like(wide)
        moved[index] = step
        differences[index] = (value(wide + moved) - value(wide - moved)) / (2 * step)
    # Central differences in float64 are good to 1e-9, the gradients are of the size 1e-3.
    np.testing.assert_allclose(gradient, differences, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("compare", ["channel_and_spatial", "elementwise"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_equal_features_cost_nothing_and_have_gradient_0(compare: str, scale: float) -> None:
    # Scale 0: features that are 0 everywhere have no direction either.
    a = scale * random((3, 4, 5, 6))
    value, gradient = jax.value_and_grad(lambda x: feature_swap([(x, a)], compare))(a)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_a_factor_on_the_features_of_an_image_divides_the_gradient_and_keeps_the_value() -> None:
    a, r = pair()
    factors = jnp.array([0.5, 3.0, 10.0])[:, None, None, None]
    value, gradient = jax.value_and_grad(lambda x: feature_swap([(x, r)]))(a)
    scaled, scaled_gradient = jax.value_and_grad(lambda x: feature_swap([(x, r)]))(a * factors)
    np.testing.assert_allclose(scaled, value, rtol=1e-6)
    # Relative to the largest: rounding of differences of unit vectors.
    np.testing.assert_allclose(scaled_gradient * factors, gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())


def test_a_network_without_features_is_refused() -> None:
    outputs = Outputs(logits=jnp.zeros((2, CLASSES)), features=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="the network hands out no features"):
        FeatureSwap()(outputs, batch_of([0, 1]), {}, CTX)


# ---- bank of soft labels


def outputs_of(logits: Any) -> Outputs:
    logits = jnp.asarray(logits, jnp.float32)
    return Outputs(logits=logits, features=jnp.zeros((logits.shape[0], 2)))


def right(labels: list[int], seed: int = 0) -> jax.Array:
    """Logits whose largest is that of the label."""
    return random((len(labels), CLASSES), seed) + 10 * jax.nn.one_hot(jnp.asarray(labels), CLASSES)


def epoch(bank: LabelBank, state: Any, *steps: tuple[Any, list[int]]) -> Any:
    """State after an epoch of steps (logits, labels)."""
    for logits, labels in steps:
        state = bank.after_step(outputs_of(logits), batch_of(labels), state)
    return bank.after_epoch(state)


def term(bank: LabelBank, state: Any, logits: Any, labels: Any, mask: Any = None) -> tuple[float, np.ndarray]:
    """Value and gradient with respect to the logits."""
    logits = jnp.asarray(logits, jnp.float32)
    value, gradient = jax.value_and_grad(lambda x: bank(outputs_of(x), batch_of(labels, mask), state, CTX))(logits)
    return float(value), np.asarray(gradient)


def test_a_row_is_the_mean_of_the_logits_of_the_images_classified_right() -> None:
    labels = [0, 1, 2, 0, 3, 1]
    logits = np.array(right(labels))
    logits[[1, 4]] = -logits[[1, 4]]  # one of two of class 1 is wrong, and the only one of class 3
    bank = LabelBank()
    state = epoch(bank, bank.init(CLASSES), (logits[:4], labels[:4]), (logits[4:], labels[4:]))
    expected = np.stack([logits[[0, 3]].mean(axis=0), logits[5], logits[2], np.zeros(CLASSES)])
    np.testing.assert_allclose(state["bank"], expected, **TOLERANCE)
    np.testing.assert_array_equal(state["known"], [True, True, True, False])


def test_the_first_epoch_costs_nothing() -> None:
    for bank in (LabelBank(), LabelBank(strict_release=True), LabelBank(reset_each_epoch=True)):
        value, gradient = term(bank, bank.init(CLASSES), random((5, CLASSES)), [0, 1, 2, 3, 0])
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_the_bank_of_an_epoch_is_the_target_of_the_next_one_only() -> None:
    bank, labels = LabelBank(), [0, 1, 2, 3]
    first, second = right(labels, 1), right(labels, 2)
    state = epoch(bank, bank.init(CLASSES), (first, labels))
    during = bank.after_step(outputs_of(second), batch_of(labels), state)
    # Collecting does not move the target of the epoch under way.
    np.testing.assert_array_equal(during["bank"], state["bank"])
    assert term(bank, during, second, labels)[0] == term(bank, state, second, labels)[0] > 0
    np.testing.assert_allclose(bank.after_epoch(during)["bank"], second, **TOLERANCE)
    assert int(bank.after_epoch(during)["epochs"]) == 2


@pytest.mark.parametrize("temperature", [4.0, 1.0])
def test_the_term_is_the_divergence_from_the_row_of_the_true_class(temperature: float) -> None:
    bank, labels = LabelBank(temperature=temperature), [0, 1, 2, 3]
    state = epoch(bank, bank.init(CLASSES), (right(labels), labels))
    logits, chosen = random((5, CLASSES), 7), [2, 2, 0, 3, 1]
    value, gradient = term(bank, state, logits, chosen)
    target = softmax(np.asarray(state["bank"], np.float64)[chosen] / temperature)
    student = softmax(np.asarray(logits, np.float64) / temperature)
    expected = temperature**2 * np.mean(np.sum(target * (np.log(target) - np.log(student)), axis=-1))
    np.testing.assert_allclose(value, expected, **TOLERANCE)
    np.testing.assert_allclose(gradient, temperature * (student - target) / 5, rtol=1e-4, atol=1e-6)


def test_a_class_that_was_not_right_keeps_its_row() -> None:
    bank = LabelBank()
    state = epoch(bank, bank.init(CLASSES), (right([0, 1, 2, 3]), [0, 1, 2, 3]))
    later = epoch(bank, state, (right([0, 1, 2, 0], 5), [0, 1, 2, 3]))
    np.testing.assert_array_equal(later["bank"][3], state["bank"][3])
    assert (later["bank"][:3] != state["bank"][:3]).all()
    assert later["known"].all()


def test_a_class_that_was_never_right_has_no_loss() -> None:
    bank = LabelBank()
    state = epoch(bank, bank.init(CLASSES), (right([0, 1, 2]), [0, 1, 2]))
    logits = random((4, CLASSES), 3)
    value, gradient = term(bank, state, logits, [3, 3, 3, 0])
    np.testing.assert_array_equal(gradient[:3], 0)
    assert np.abs(gradient[3]).max() > 0
    # The mean is over all images, with or without a row.
    np.testing.assert_allclose(value, term(bank, state, logits[3:], [0])[0] / 4, rtol=1e-5)


def test_in_the_strict_form_a_class_that_was_not_right_makes_the_loss_nan() -> None:
    bank = LabelBank(strict_release=True)
    state = epoch(bank, bank.init(CLASSES), (right([0, 1, 2]), [0, 1, 2]))
    assert np.isnan(state["bank"][3]).all() and np.isfinite(state["bank"][:3]).all()
    assert np.isnan(term(bank, state, random((2, CLASSES)), [3, 0])[0])


def test_in_the_strict_form_an_absent_class_spoils_nothing() -> None:
    # A product with one-hot labels would spread the NaN to every class.
    bank, default = LabelBank(strict_release=True), LabelBank()
    steps = ((right([0, 1, 2]), [0, 1, 2]),)
    state, finite = epoch(bank, bank.init(CLASSES), *steps), epoch(default, default.init(CLASSES), *steps)
    logits = random((3, CLASSES))
    value, gradient = term(bank, state, logits, [0, 1, 2])
    expected, expected_gradient = term(default, finite, logits, [0, 1, 2])
    assert value == expected and np.isfinite(value)
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_in_the_strict_form_a_row_that_only_fills_up_the_batch_spoils_nothing() -> None:
    bank = LabelBank(strict_release=True)
    state = epoch(bank, bank.init(CLASSES), (right([0, 1, 2]), [0, 1, 2]))
    logits = random((3, CLASSES))
    value, gradient = term(bank, state, logits, [0, 1, 3], [True, True, False])
    expected, expected_gradient = term(bank, state, logits[:2], [0, 1])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:2], expected_gradient, rtol=1e-6)
    np.testing.assert_array_equal(gradient[2], 0)


def test_in_the_strict_form_a_class_that_is_right_again_has_a_row_again() -> None:
    bank, labels = LabelBank(strict_release=True), [0, 1, 2, 3]
    state = epoch(bank, bank.init(CLASSES), (right([0, 1, 2]), [0, 1, 2]))
    later = epoch(bank, state, (right(labels, 2), labels))
    np.testing.assert_allclose(later["bank"], right(labels, 2), **TOLERANCE)


def test_a_bank_of_log_probabilities_collects_them() -> None:
    bank, labels = LabelBank(log_softmax=True), [0, 1, 2, 3]
    state = epoch(bank, bank.init(CLASSES), (right(labels), labels))
    expected = np.log(softmax(np.asarray(right(labels), np.float64)))
    # Absolute: the log-sum-exp of logits of about 10 in float32.
    np.testing.assert_allclose(state["bank"], expected, atol=2e-6)
    # A constant on the logits of an image changes its raw row and not this one.
    shifted = epoch(bank, bank.init(CLASSES), (right(labels) + 3.0, labels))
    np.testing.assert_allclose(shifted["bank"], state["bank"], atol=2e-6)


def test_a_bank_that_is_cleared_teaches_the_uniform_distribution() -> None:
    bank, labels = LabelBank(reset_each_epoch=True), [0, 1, 2, 3]
    state = epoch(bank, bank.init(CLASSES), (right(labels), labels))
    np.testing.assert_array_equal(state["bank"], 0)
    logits = random((2, CLASSES))
    student = softmax(np.asarray(logits, np.float64) / 4)
    expected = 16 * np.mean(np.sum(0.25 * (np.log(0.25) - np.log(student)), axis=-1))
    np.testing.assert_allclose(term(bank, state, logits, [0, 3])[0], expected, **TOLERANCE)


def test_collecting_is_kept_apart_for_every_class_and_starts_anew_each_epoch() -> None:
    bank, labels = LabelBank(), [0, 0, 1, 2]
    state = bank.after_step(outputs_of(right(labels)), batch_of(labels), bank.init(CLASSES))
    np.testing.assert_array_equal(state["count"], [2, 1, 1, 0])
    np.testing.assert_allclose(state["sum"][0], right(labels)[:2].sum(axis=0), rtol=1e-6)
    closed = bank.after_epoch(state)
    np.testing.assert_array_equal(closed["count"], 0)
    np.testing.assert_array_equal(closed["sum"], 0)


# ---- clusters


def cluster(features: Any, labels: Any, mask: Any = None, **options: Any) -> tuple[float, np.ndarray]:
    """Value and gradient with respect to the features."""

    def value_of(x: jax.Array) -> jax.Array:
        outputs = Outputs(logits=jnp.zeros((x.shape[0], CLASSES)), features=x)
        return Cluster(**options)(outputs, batch_of(labels, mask), {}, CTX)

    value, gradient = jax.value_and_grad(value_of)(jnp.asarray(features, jnp.float32))
    return float(value), np.asarray(gradient)


def test_the_cluster_term_follows_the_formula_with_constant_centres() -> None:
    labels = np.array([0, 1, 0, 2, 1, 0])
    p = np.asarray(random((6, 5)), np.float64)
    centres = np.stack([p[labels == label].mean(axis=0) for label in range(3)])[labels]
    sizes, centre_sizes = np.linalg.norm(p, axis=1), np.linalg.norm(centres, axis=1)
    cosines = (p * centres).sum(axis=1) / sizes / centre_sizes
    value, gradient = cluster(p, labels)
    np.testing.assert_allclose(value, np.mean(0.5 * (1 - cosines)), **TOLERANCE)
    # d cos / d p = (c / |c| - cos * p / |p|) / |p| with the centre held.
    by_row = centres / centre_sizes[:, None] - cosines[:, None] * p / sizes[:, None]
    np.testing.assert_allclose(gradient, -0.5 / 6 * by_row / sizes[:, None], rtol=1e-4, atol=1e-6)


def test_a_class_with_one_image_costs_nothing() -> None:
    # Its centre is itself: what is left is rounding of the cosine.
    value, gradient = cluster(random((3, 5)), [0, 1, 2])
    assert abs(value) < 1e-6
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_the_lengths_of_the_features_do_not_count() -> None:
    p = random((4, 5))
    np.testing.assert_allclose(cluster(7 * p, [0, 0, 1, 1])[0], cluster(p, [0, 0, 1, 1])[0], rtol=1e-5)


def test_features_of_zeros_have_a_finite_gradient() -> None:
    for features in (jnp.zeros((2, 5)), jnp.array([[1.0, 0.0], [-1.0, 0.0]])):
        value, gradient = cluster(features, [0, 0])
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_clusters_of_logits_are_those_of_the_logits() -> None:
    logits, labels = random((4, CLASSES)), [0, 0, 1, 1]
    outputs = Outputs(logits=logits, features=jnp.ones((4, 2)))
    value = Cluster(on="logits")(outputs, batch_of(labels), {}, CTX)
    np.testing.assert_allclose(value, cluster(logits, labels)[0], rtol=1e-6)
    assert value > 0
    np.testing.assert_allclose(Cluster()(outputs, batch_of(labels), {}, CTX), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureSwap(compare="l2"), "feature_swap: compare='l2': accepted are channel_and_spatial, element"),
        (lambda: Cluster(on="images"), "cluster: on='images': accepted are features, logits"),
        (lambda: LabelBank(temperature=0.0), "label_bank: temperature=0.0: accepted are positive numbers"),
    ],
)
def test_wrong_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
