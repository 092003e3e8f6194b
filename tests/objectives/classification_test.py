import jax.numpy as jnp
import numpy as np

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
