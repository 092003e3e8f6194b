import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.objectives import Batch, Outputs
from bnn_jax.objectives.distill import Distillation, divergence
from bnn_jax.quantizers.base import QuantContext

ROWS, CLASSES = 6, 5


def logits(seed: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(0, 3, (ROWS, CLASSES)), jnp.float32)


def term(objective: Distillation, student: jax.Array, teacher: jax.Array) -> jax.Array:
    batch = Batch(jnp.zeros((ROWS, 1, 1, 3)), jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS, bool))
    return objective(Outputs(student, jnp.zeros((ROWS, 1)), teacher), batch, {}, QuantContext())


def probabilities(values: jax.Array, temperature: float) -> np.ndarray:
    powers = np.exp(np.asarray(values, np.float64) / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_batchmean_is_the_divergence_per_row(temperature):
    student, teacher = logits(0), logits(1)
    p_teacher, p_student = probabilities(teacher, temperature), probabilities(student, temperature)
    expected = (p_teacher * np.log(p_teacher / p_student)).sum() / ROWS
    np.testing.assert_allclose(term(Distillation(temperature=temperature), student, teacher), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_cross_entropy_is_that_with_the_teachers_probabilities_as_labels(temperature):
    student, teacher = logits(0), logits(1)
    p_teacher, p_student = probabilities(teacher, temperature), probabilities(student, temperature)
    expected = -(p_teacher * np.log(p_student)).sum() / ROWS
    objective = Distillation(temperature=temperature, measure="cross_entropy")
    np.testing.assert_allclose(term(objective, student, teacher), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("measure", ["divergence", "cross_entropy"])
def test_the_gradient_is_the_difference_of_the_probabilities(temperature, measure):
    student, teacher = logits(0), logits(1)
    objective = Distillation(temperature=temperature, measure=measure)
    gradient = jax.grad(lambda s: term(objective, s, teacher))(student)
    expected = (probabilities(student, temperature) - probabilities(teacher, temperature)) / temperature / ROWS
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_mean_is_batchmean_divided_by_the_number_of_classes():
    student, teacher = logits(0), logits(1)
    mean, batchmean = (term(Distillation(reduction=name), student, teacher) for name in ("mean", "batchmean"))
    np.testing.assert_allclose(mean, batchmean / CLASSES, rtol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_a_student_that_equals_its_teacher_has_loss_0_and_gradient_0(reduction):
    objective = Distillation(temperature=5.0, reduction=reduction)
    value, gradient = jax.value_and_grad(lambda s: term(objective, s, logits(1)))(logits(1))
    # Teacher and student are computed along two paths: rounding only.
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-8)


def test_an_offset_of_all_logits_changes_nothing():
    np.testing.assert_allclose(
        divergence(logits(0) + 7.0, logits(1) - 3.0, 2.0), divergence(logits(0), logits(1), 2.0), rtol=1e-4, atol=1e-5
    )


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction='sum': accepted are mean, batchmean"):
        Distillation(reduction="sum")


def test_an_unknown_measure_is_refused():
    with pytest.raises(ValueError, match="measure='distance': accepted are divergence, cross_entropy"):
        Distillation(measure="distance")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="accepted are positive numbers"):
        Distillation(temperature=temperature)
