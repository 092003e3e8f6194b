import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.objectives import Batch, Outputs
from bnn_jax.objectives.base import masked_mean
from bnn_jax.objectives.classification import CrossEntropy
from bnn_jax.quantizers.base import QuantContext


def test_cross_entropy_is_the_mean_negative_log_likelihood():
    rng = np.random.RandomState(0)
    logits, labels = rng.normal(size=(5, 3)), np.array([0, 2, 1, 1, 0])
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    outputs = Outputs(logits=jnp.asarray(logits, jnp.float32), features=jnp.zeros((5, 1)))
    batch = Batch(images=jnp.zeros((5, 1, 1, 3)), labels=jnp.asarray(labels), mask=jnp.ones(5, bool))
    value = CrossEntropy()(outputs, batch, {}, QuantContext())
    np.testing.assert_allclose(value, -log_probabilities[np.arange(5), labels].mean(), rtol=1e-6)


def test_masked_mean_counts_the_valid_rows_only():
    assert masked_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False])) == 2.0


def test_masked_mean_of_no_row_is_0():
    assert masked_mean(jnp.array([1.0, 3.0]), jnp.zeros(2, bool)) == 0.0


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_are_mixed_and_then_smoothed(smoothing, mixed):
    rng = np.random.RandomState(1)
    logits, labels, others = rng.normal(size=(5, 3)), np.array([0, 2, 1, 1, 0]), np.array([1, 1, 2, 0, 0])
    share, mask = np.array([0.5, 0.75, 1.0, 0.9, 0.6]), np.array([True, True, True, True, False])
    probabilities = np.eye(3)[labels]
    if mixed:
        probabilities = share[:, None] * probabilities + (1 - share[:, None]) * np.eye(3)[others]
    targets = (1 - smoothing) * probabilities + smoothing / 3
    rows = -(targets * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))).sum(axis=1)
    mixture = {"other_labels": jnp.asarray(others), "share": jnp.asarray(share, jnp.float32)} if mixed else {}
    batch = Batch(jnp.zeros((5, 1, 1, 3)), jnp.asarray(labels), jnp.asarray(mask), **mixture)
    outputs = Outputs(logits=jnp.asarray(logits, jnp.float32), features=jnp.zeros((5, 1)))
    value = CrossEntropy(label_smoothing=smoothing)(outputs, batch, {}, QuantContext())
    np.testing.assert_allclose(value, rows[mask].mean(), rtol=1e-6)


def test_a_smoothing_that_leaves_nothing_of_the_label_is_refused():
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0: accepted is 0 <= value < 1"):
        CrossEntropy(label_smoothing=1.0)
