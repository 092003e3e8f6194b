"""What every objective of the table has to satisfy. A new table entry needs example options here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.objectives import OBJECTIVES, Batch, Objective, Outputs, build
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import Spec, spec

EXAMPLES: dict[str, list[Spec]] = {
    "cross_entropy": [spec("cross_entropy")],
    "distillation": [
        spec("distillation"),
        spec("distillation", temperature=5.0, reduction="mean"),
        spec("distillation", temperature=0.5, reduction="batchmean"),
        spec("distillation", measure="cross_entropy"),
    ],
    "squared_hinge": [spec("squared_hinge")],
    "feature_swap": [spec("feature_swap"), spec("feature_swap", compare="elementwise")],
    "label_bank": [
        spec("label_bank"),
        spec("label_bank", temperature=1.0, log_softmax=True),
        spec("label_bank", reset_each_epoch=True),
    ],
    "cluster": [spec("cluster"), spec("cluster", on="logits")],
}
CASES = [example for examples in EXAMPLES.values() for example in examples]
NEED_TEACHER = [example for example in CASES if "teacher_logits" in OBJECTIVES[example.name].needs]
ROWS, CLASSES, FEATURES = 6, 5, 7
# Sums of a few rows in another order: units in the last place of float32.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def spec_id(choice: Spec) -> str:
    return f"{choice.name}({','.join(f'{key}={value}' for key, value in choice.options)})"


each_objective = pytest.mark.parametrize("choice", CASES, ids=spec_id)


def inputs(rows: int = ROWS, seed: int = 0, spread: float = 3.0) -> tuple[Outputs, Batch]:
    rng = np.random.RandomState(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, spread, shape), jnp.float32)

    labels = jnp.asarray(rng.randint(0, CLASSES, rows), jnp.int32)
    maps = [normal(rows, *shape) for shape in ((4, 4, 3), (4, 4, 3), (2, 2, 6), (2, 2, 6))]
    outputs = Outputs(
        # Every second row is classified right, so that states that collect right ones are not empty.
        logits=normal(rows, CLASSES) + 4 * spread * jax.nn.one_hot(labels, CLASSES) * (jnp.arange(rows) % 2)[:, None],
        features=normal(rows, FEATURES),
        teacher_logits=normal(rows, CLASSES),
        block_features=(maps[0], maps[2]),
        real_features=(maps[1], maps[3]),
    )
    return outputs, Batch(images=normal(rows, 4, 4, 3), labels=labels, mask=jnp.ones(rows, bool))


def first_rows(outputs: Outputs, batch: Batch, rows: int) -> tuple[Outputs, Batch]:
    return jax.tree.map(lambda leaf: leaf[:rows], (outputs, batch))


def last_rows_masked(outputs: Outputs, batch: Batch, valid: int) -> tuple[Outputs, Batch]:
    return outputs, batch.replace(mask=jnp.arange(ROWS) < valid)


def state_of(objective: Objective) -> Any:
    """State in the second epoch: in the first, some terms are 0."""
    return objective.after_epoch(objective.after_step(*inputs(), objective.init(CLASSES)))


def value_and_gradients(objective: Objective, outputs: Outputs, batch: Batch) -> tuple[jax.Array, Outputs]:
    state = state_of(objective)
    return jax.value_and_grad(lambda o: objective(o, batch, state, QuantContext(train=True)))(outputs)


def test_every_table_entry_has_examples():
    missing = sorted(set(OBJECTIVES) - set(EXAMPLES))
    assert not missing, f"objectives {missing}: add options to EXAMPLES of {__file__}"


def test_every_table_entry_has_the_name_of_its_class():
    assert {name: objective.name for name, objective in OBJECTIVES.items()} == {name: name for name in OBJECTIVES}


def test_an_unknown_objective_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'hinge': accepted are cross_entropy"):
        build(spec("hinge"))


@each_objective
def test_the_term_is_a_finite_float32_scalar_with_finite_gradients(choice):
    value, gradients = value_and_gradients(build(choice), *inputs())
    assert value.shape == () and value.dtype == jnp.float32 and jnp.isfinite(value)
    for leaf in jax.tree.leaves(gradients):
        assert jnp.isfinite(leaf).all()
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradients)) > 0


@each_objective
def test_the_term_stays_finite_at_large_logits(choice):
    # exp(1000) overflows: only the log-sum-exp form survives.
    value, gradients = value_and_gradients(build(choice), *inputs(spread=1000.0))
    assert jnp.isfinite(value)
    for leaf in jax.tree.leaves(gradients):
        assert jnp.isfinite(leaf).all()


@each_objective
@pytest.mark.parametrize("valid", [1, 4])
def test_a_masked_batch_equals_the_unpadded_one(choice, valid):
    objective, (outputs, batch) = build(choice), inputs()
    value, gradients = value_and_gradients(objective, *last_rows_masked(outputs, batch, valid))
    expected, expected_gradients = value_and_gradients(objective, *first_rows(outputs, batch, valid))
    np.testing.assert_allclose(value, expected, **TOLERANCE)
    for leaf, expected_leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(leaf[:valid], expected_leaf, **TOLERANCE)
        np.testing.assert_array_equal(leaf[valid:], 0)


@each_objective
def test_the_state_after_a_masked_step_equals_that_of_the_unpadded_one(choice):
    objective, (outputs, batch) = build(choice), inputs()
    states = [
        objective.after_epoch(objective.after_step(*pair, objective.init(CLASSES)))
        for pair in (last_rows_masked(outputs, batch, 4), first_rows(outputs, batch, 4))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), *states)


@each_objective
def test_the_state_keeps_its_structure(choice):
    objective, (outputs, batch) = build(choice), inputs()
    state = objective.init(CLASSES)

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes(objective.after_step(outputs, batch, state)) == shapes(state)
    assert shapes(objective.after_epoch(state)) == shapes(state)


@each_objective
def test_the_term_is_the_same_inside_jit(choice):
    objective, (outputs, batch) = build(choice), inputs()
    state, ctx = state_of(objective), QuantContext(train=True)
    np.testing.assert_allclose(
        jax.jit(objective)(outputs, batch, state, ctx), objective(outputs, batch, state, ctx), **TOLERANCE
    )


@each_objective
def test_the_weight_is_kept_for_the_step_and_not_applied_twice(choice):
    outputs, batch = inputs()
    weighted = build(Spec(choice.name, (*choice.options, ("weight", 0.25))))
    assert weighted.weight == 0.25
    plain = build(choice)
    assert dataclasses.replace(weighted, weight=plain.weight) == plain
    state = state_of(plain)
    np.testing.assert_array_equal(
        weighted(outputs, batch, state, QuantContext()), plain(outputs, batch, state, QuantContext())
    )


@pytest.mark.parametrize("choice", NEED_TEACHER, ids=spec_id)
def test_the_teacher_gets_no_gradient(choice):
    _, gradients = value_and_gradients(build(choice), *inputs())
    np.testing.assert_array_equal(gradients.teacher_logits, 0)


@pytest.mark.parametrize("choice", [c for c in CASES if c not in NEED_TEACHER], ids=spec_id)
def test_a_term_that_asks_for_no_teacher_works_without_one(choice):
    outputs, batch = inputs()
    objective = build(choice)
    alone = objective(outputs.replace(teacher_logits=None), batch, objective.init(CLASSES), QuantContext(train=True))
    assert jnp.isfinite(alone)


@pytest.mark.parametrize("choice", [c for c in CASES if "real_features" not in OBJECTIVES[c.name].needs], ids=spec_id)
def test_a_term_that_asks_for_no_real_stream_works_without_one(choice):
    outputs, batch = inputs()
    objective = build(choice)
    outputs = outputs.replace(block_features=(), real_features=())
    assert jnp.isfinite(objective(outputs, batch, state_of(objective), QuantContext(train=True)))


@each_objective
def test_the_real_stream_gets_no_gradient(choice):
    _, gradients = value_and_gradients(build(choice), *inputs())
    for leaf in gradients.real_features:
        np.testing.assert_array_equal(leaf, 0)
