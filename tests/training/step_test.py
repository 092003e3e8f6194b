import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax import schedules
from bnn_jax.data.order import index_plan
from bnn_jax.objectives import Batch, Objective, Outputs
from bnn_jax.objectives.base import masked_mean
from bnn_jax.objectives.classification import CrossEntropy
from bnn_jax.objectives.distill import Distillation
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.epoch_sums import label_rank, zero_metric_sums
from bnn_jax.training.evaluate import compile_eval_step
from bnn_jax.training.step import (
    compile_end_of_epoch,
    compile_train_steps,
    needs_teacher,
    train_step,
)
from tests.training import tiny

DATA = tiny.source()
# Sums over the rows of a batch in another order, in float32.
OTHER_ORDER = {"rtol": 1e-5, "atol": 1e-6}


@dataclasses.dataclass(frozen=True)
class Counting(Objective):
    """Keeps the number of steps and images it has seen, and of epochs; its term is the mean squared logit."""

    name = "counting"

    def init(self, num_classes: int) -> Any:
        return {"steps": jnp.zeros((), jnp.int32), "images": jnp.zeros(num_classes), "epochs": jnp.zeros(())}

    def __call__(self, outputs: Outputs, batch: Batch, state: Any, ctx: QuantContext) -> jax.Array:
        return masked_mean(jnp.mean(outputs.logits**2, axis=-1), batch.mask) + 0.0 * state["epochs"]

    def after_step(self, outputs: Outputs, batch: Batch, state: Any) -> Any:
        seen = jax.nn.one_hot(batch.labels, state["images"].shape[0]) * batch.mask[:, None]
        return {**state, "steps": state["steps"] + 1, "images": state["images"] + seen.sum(axis=0)}

    def after_epoch(self, state: Any) -> Any:
        return {**state, "epochs": state["epochs"] + 1}


@dataclasses.dataclass(frozen=True)
class Knob(Objective):
    """Its term is the knob 'temperature' of the context."""

    name = "knob"

    def __call__(self, outputs: Outputs, batch: Batch, state: Any, ctx: QuantContext) -> jax.Array:
        return ctx.knobs["temperature"] + 0.0 * outputs.logits.sum()


def plan(epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return index_plan(3, epoch, num_images=20, batch_size=8, drop_last=False)


def one_step(parts: Any, state: Any, indices: Any, mask: Any, teacher: Any = None) -> tuple[Any, dict]:
    step = jax.jit(functools.partial(train_step, parts))
    return step(state, tiny.constants(DATA, teacher), jnp.asarray(indices), jnp.asarray(mask))


# Programs are compiled once for the whole file: compiling is what takes the time here.
@pytest.fixture(scope="module")
def parts():
    return tiny.parts()


@pytest.fixture(scope="module")
def run_steps(parts):
    return compile_train_steps(parts, all_devices())


@pytest.fixture(scope="module")
def counting_parts():
    return tiny.parts(objectives=(CrossEntropy(weight=0.25), Counting(weight=2.0)))


@pytest.fixture(scope="module")
def run_counting_steps(counting_parts):
    return compile_train_steps(counting_parts, all_devices())


def test_the_masked_last_batch_equals_the_unpadded_one():
    # Augmentation off: its draws are tested to be the same for both in devices_test.
    plain = tiny.parts(augment="none")
    indices, mask = plan()
    assert mask[-1].sum() == 4
    padded, padded_metrics = one_step(plain, tiny.state(plain), indices[-1], mask[-1])
    short, short_metrics = one_step(plain, tiny.state(plain), indices[-1][:4], mask[-1][:4])
    for field in ("params", "batch_stats", "opt_state", "metric_sums"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **OTHER_ORDER), getattr(padded, field), getattr(short, field)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **OTHER_ORDER), padded_metrics, short_metrics)


def test_what_fills_up_a_batch_changes_nothing(parts, run_steps):
    indices, mask = plan()
    other = np.where(mask[-1], indices[-1], 17).astype(np.int32)
    one, _ = run_steps(tiny.state(parts), tiny.constants(DATA), indices[-1:], mask[-1:])
    two, _ = run_steps(tiny.state(parts), tiny.constants(DATA), other[None], mask[-1:])
    tiny.assert_equal(two, one)


def test_running_statistics_of_a_masked_batch_are_those_of_the_valid_rows():
    plain = tiny.parts(augment="none", network=tiny.TinyNetwork(weight=spec("identity")))
    indices, mask = plan()
    state, _ = one_step(plain, tiny.state(plain), indices[-1], mask[-1])
    kernel = np.asarray(tiny.variables(plain.network)["params"]["conv"]["kernel"])
    images = tiny.prepare_for_evaluation(jnp.asarray(DATA.train.images[indices[-1][:4]]))
    y = np.asarray(
        jax.lax.conv_general_dilated(
            images, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    ).reshape(-1, 4)
    statistics = state.batch_stats["bn"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * y.mean(axis=0), **OTHER_ORDER)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * y.var(axis=0, ddof=1), **OTHER_ORDER)


def test_several_steps_in_one_dispatch_equal_single_ones(parts, run_steps):
    indices, mask = plan()
    constants = tiny.constants(DATA)
    together, stacked = run_steps(tiny.state(parts), constants, indices, mask)
    alone, rows = tiny.state(parts), []
    for i in range(3):
        alone, metrics = run_steps(alone, constants, indices[i : i + 1], mask[i : i + 1])
        rows.append(metrics)
    # The unrolled program is fused otherwise than three single ones: rounding of float32 over three steps.
    for field in ("params", "batch_stats", "quant_state", "opt_state", "metric_sums"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            getattr(together, field),
            getattr(alone, field),
        )
    assert int(together.step) == int(alone.step) == 3
    for name, values in stacked.items():
        assert values.shape == (3,)
        np.testing.assert_allclose(values, np.concatenate([row[name] for row in rows]), rtol=1e-5, atol=1e-6)


def test_the_same_program_on_the_same_state_gives_the_same_bits(parts, run_steps):
    indices, mask = plan()
    runs = [run_steps(tiny.state(parts), tiny.constants(DATA), indices[:1], mask[:1]) for _ in range(2)]
    tiny.assert_equal(*runs)


def test_one_program_serves_all_steps_of_a_stage(parts):
    run_steps = compile_train_steps(parts, all_devices())
    state, constants = tiny.state(parts), tiny.constants(DATA)
    # Over the boundary of the schedule and with partial batches.
    for epoch in range(3):
        for indices, mask in zip(*plan(epoch)):
            state, _ = run_steps(state, constants, indices[None], mask[None])
    assert int(state.step) == 9
    assert run_steps._cache_size() == 1


def test_draws_are_a_function_of_seed_and_step(parts, run_steps):
    indices, mask = plan()

    def parameters_after(*, seed: int, step: int) -> Any:
        state = tiny.state(parts, seed=seed).replace(step=jnp.int32(step))
        return run_steps(state, tiny.constants(DATA), indices[:1], mask[:1])[0].params

    def differ(one: Any, other: Any) -> bool:
        return any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))

    first = parameters_after(seed=1, step=0)
    assert not differ(first, parameters_after(seed=1, step=0))
    assert differ(first, parameters_after(seed=1, step=1))
    assert differ(first, parameters_after(seed=2, step=0))


def test_the_loss_is_the_weighted_sum_of_the_terms(counting_parts, run_counting_steps):
    indices, mask = plan()
    _, metrics = run_counting_steps(tiny.state(counting_parts), tiny.constants(DATA), indices[:1], mask[:1])
    expected = 0.25 * metrics["loss/cross_entropy"] + 2.0 * metrics["loss/counting"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_the_state_of_an_objective_follows_steps_and_epochs(counting_parts, run_counting_steps):
    state = tiny.state(counting_parts)
    assert set(state.objective_state) == {"counting"}
    for indices, mask in zip(*plan()):
        state, _ = run_counting_steps(state, tiny.constants(DATA), indices[None], mask[None])
    counts = state.objective_state["counting"]
    assert int(counts["steps"]) == 3
    np.testing.assert_array_equal(counts["images"], np.bincount(DATA.train.labels, minlength=tiny.CLASSES))
    state = compile_end_of_epoch(counting_parts.objectives, all_devices())(state)
    assert float(state.objective_state["counting"]["epochs"]) == 1


def test_the_sums_of_the_metrics_are_those_of_the_images(parts, run_steps):
    state, metrics = run_steps(tiny.state(parts), tiny.constants(DATA), *plan())
    sums = state.metric_sums
    assert float(sums["count"]) == 20
    assert float(sums["correct"]) == float(metrics["correct"].sum())
    np.testing.assert_allclose(sums["loss"], (metrics["loss"] * metrics["count"]).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["loss/cross_entropy"], sums["loss"], rtol=1e-6)
    assert int(sums["non_finite_step"]) == -1


def test_the_rank_of_a_label_is_its_place_in_the_order_of_top_k():
    # Few values, so that there are ties.
    logits = jnp.asarray(np.random.RandomState(0).randint(0, 4, (50, 9)), jnp.float32)
    order = jax.lax.top_k(logits, 9)[1]
    for label in range(9):
        found = label_rank(logits, jnp.full(50, label))
        np.testing.assert_array_equal(found, np.argmax(np.asarray(order) == label, axis=1))
    # Of a broken network no label is right.
    assert int(label_rank(jnp.full((1, 9), jnp.nan), jnp.zeros(1, jnp.int32))[0]) > 0


def test_training_images_with_the_label_among_the_first_five_are_summed_where_asked_for(parts, run_steps):
    assert "correct5" not in tiny.state(parts).metric_sums
    state = tiny.state(parts)
    state = state.replace(metric_sums=zero_metric_sums(parts.objectives, with_top5=True))
    state, metrics = run_steps(state, tiny.constants(DATA), *plan())
    # Of four classes all are among the first five; padding does not count.
    assert float(state.metric_sums["correct5"]) == float(metrics["correct5"].sum()) == 20


def test_the_end_of_an_epoch_clears_the_sums_and_nothing_else(parts, run_steps):
    state, _ = run_steps(tiny.state(parts), tiny.constants(DATA), *plan())
    kept = jax.tree.map(np.asarray, (state.params, state.opt_state, state.batch_stats, state.quant_state))
    closed = compile_end_of_epoch(parts.objectives, all_devices())(state)
    tiny.assert_equal((closed.params, closed.opt_state, closed.batch_stats, closed.quant_state), kept)
    tiny.assert_equal(closed.metric_sums, zero_metric_sums(parts.objectives))
    assert int(closed.step) == 3


def test_the_first_step_whose_loss_is_not_finite_is_remembered(parts, run_steps):
    state = tiny.state(parts)
    indices, mask = plan()
    state, _ = run_steps(state, tiny.constants(DATA), indices[:1], mask[:1])
    broken = jax.tree.map(lambda p: p * jnp.nan, state.params)
    state, metrics = run_steps(state.replace(params=broken), tiny.constants(DATA), indices[1:2], mask[1:2])
    assert not np.isfinite(metrics["loss"]).any()
    state, _ = run_steps(state, tiny.constants(DATA), indices[2:], mask[2:])
    assert int(state.metric_sums["non_finite_step"]) == 1


def test_masks_of_pruned_weights_stay(parts, run_steps):
    before = tiny.variables()["quant_state"]
    assert 0 < before["conv"]["weight_quantizer"]["mask"].mean() < 1
    state, _ = run_steps(tiny.state(parts), tiny.constants(DATA), *plan())
    tiny.assert_equal(state.quant_state, before)


def test_the_teacher_is_applied_in_evaluation_mode_and_distils():
    network = tiny.TinyNetwork()
    parts = tiny.parts(objectives=(Distillation(),), teacher=network, augment="none")
    teacher = tiny.variables(network)
    indices, mask = (a[0] for a in plan())
    _, metrics = one_step(parts, tiny.state(parts), indices, mask, teacher)

    @jax.jit
    def divergence_of_the_modes(images: jax.Array) -> jax.Array:
        # Student and teacher have the same variables; only their mode differs.
        student = network.apply(teacher, images, QuantContext(train=True), mutable=["batch_stats"])[0].logits
        taught = jax.nn.log_softmax(network.apply(teacher, images, QuantContext()).logits)
        return jnp.sum(jnp.exp(taught) * (taught - jax.nn.log_softmax(student)), axis=-1).mean()

    expected = divergence_of_the_modes(tiny.prepare_for_evaluation(jnp.asarray(DATA.train.images[indices])))
    assert expected > 1e-3
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


def test_no_teacher_is_needed_where_no_objective_asks_for_one():
    assert not needs_teacher((CrossEntropy(),))
    assert needs_teacher((CrossEntropy(), Distillation()))


def test_knobs_follow_their_schedule_without_compiling_again():
    knob = schedules.build(spec("piecewise", boundaries=(1.0,), values=(7.0, 5.0)), steps_per_epoch=2, epochs=2)
    parts = tiny.parts(objectives=(CrossEntropy(), Knob()), knobs={"temperature": knob})
    run_steps = compile_train_steps(parts, all_devices())
    state, seen = tiny.state(parts), []
    indices, mask = plan()
    for _ in range(4):
        state, metrics = run_steps(state, tiny.constants(DATA), indices[:1], mask[:1])
        seen.append(float(metrics["loss/knob"][0]))
    assert seen == [7.0, 7.0, 5.0, 5.0]
    assert run_steps._cache_size() == 1


def test_the_optimizer_is_handed_the_context(parts):
    contexts = []

    def update(grads, state, params=None, *, ctx, **_):
        contexts.append(ctx)
        return grads, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: {}, update)
    indices, mask = (a[0] for a in plan())
    step = functools.partial(train_step, dataclasses.replace(parts, optimizer=optimizer))
    jax.eval_shape(step, tiny.state(parts), tiny.constants(DATA), indices, mask)
    assert contexts[0].train
    assert contexts[0].mask.shape == mask.shape


def test_the_evaluation_step_counts_valid_rows_only():
    logits = np.array([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1], [9, 0, 0, 0, 0, 0]])

    class Fixed:
        def apply(self, variables, images, ctx):
            return Outputs(logits=variables["params"][images[:, 0, 0, 0]], features=images)

    step = compile_eval_step(Fixed(), lambda images: images, all_devices())
    # A pixel tells the row of the logits.
    images = jnp.arange(4).reshape(4, 1, 1, 1)
    labels = jnp.array([0, 0, 0, 0])
    indices, mask = np.arange(4), np.array([True, True, True, False])
    sums = step({"params": jnp.asarray(logits, jnp.float32)}, images, labels, indices, mask)
    # Row 1 has its label in the sixth place; row 2 is a tie, which goes to the lower class; row 3 does not count.
    assert int(sums["count"]) == 3
    assert int(sums["correct1"]) == 2
    assert int(sums["correct5"]) == 2
    log_sum = np.log(np.exp(logits[:3]).sum(axis=1))
    np.testing.assert_allclose(sums["loss"], (log_sum - logits[:3, 0]).sum(), rtol=1e-6)


def test_top5_counts_everything_where_there_are_at_most_five_classes():
    step = compile_eval_step(tiny.TinyNetwork(), tiny.prepare_for_evaluation, all_devices())
    images, labels = jnp.asarray(DATA.test.images), jnp.asarray(DATA.test.labels)
    sums = step(tiny.variables(), images, labels, np.arange(10), np.ones(10, bool))
    assert int(sums["correct5"]) == 10
