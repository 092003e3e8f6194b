"""Several seeds in one program: each computes what it computes alone, within rounding."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.data.order import index_plan
from bnn_jax.errors import Interrupted, NonFiniteLossError
from bnn_jax.experiment import start
from bnn_jax.objectives.classification import CrossEntropy
from bnn_jax.objectives.distill import Distillation
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import metrics
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import Evaluator
from bnn_jax.training.loop import LoopOptions, StageLoop
from bnn_jax.training.seeds import ONE_SEED, Seeds, one_seed, table_row
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import StepParts, compile_end_of_epoch, compile_train_steps
from tests.training import tiny
from tests.training.loop_test import StopAfter

DATA = tiny.source(num_train=20, num_test=10)
SEEDS = Seeds(names=(5, 6), orders=(1005, 1006), initials=(5, 6))
PLAN = {"num_images": 20, "batch_size": 8, "drop_last": False}
STEPS, EPOCHS = 3, 2
STAGE = tiny.stage(epochs=EPOCHS)
DEVICES = all_devices()
PARTS = tiny.parts(chosen=STAGE)
# The same sums in another order: a few float32 roundings a step, of values of about 1. Nothing in this network jumps.
ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


def variables(seed: int) -> dict[str, Any]:
    images = tiny.prepare_for_evaluation(jnp.asarray(DATA.train.images[:4]))
    return init(PARTS.network)(jax.random.key(seed), images, {})


init = functools.cache(start.init_program)


def state(parts: StepParts, which: Any) -> TrainState:
    """A new state of one seed of ``SEEDS``, or of several."""
    one = isinstance(which, int)
    chosen = [which] if one else which
    made = [variables(SEEDS.names[index]) for index in chosen]
    return start.create_state(
        made[0] if one else SEEDS.stack(made),
        optimizer=parts.optimizer,
        objectives=parts.objectives,
        num_classes=tiny.CLASSES,
        seed=SEEDS.orders[which] if one else tuple(SEEDS.orders[index] for index in chosen),
        devices=DEVICES,
    )


def assert_close(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_allclose(one, other, **ROUNDING, err_msg=jax.tree_util.keystr(path))


# ---- parts


def test_with_one_seed_nothing_is_mapped_or_stacked():
    alone, tree = one_seed(3), {"a": jnp.ones(2)}
    assert alone.over(state) is state
    assert alone.unstack(tree) == [tree] and alone.stack([tree]) is tree and alone.shapes(tree) is tree
    assert alone.summary([{"top1": 50.0, "num_images": 8}]) == {"top1": 50.0, "num_images": 8}
    indices, mask = alone.index_plan(1, **PLAN)
    expected = index_plan(3, 1, **PLAN)
    np.testing.assert_array_equal(indices, expected[0])
    np.testing.assert_array_equal(mask, expected[1])


def test_every_seed_has_the_order_of_images_it_has_alone():
    indices, mask = SEEDS.index_plan(1, **PLAN)
    assert indices.shape == mask.shape == (STEPS, 2, 8)
    for place, order in enumerate(SEEDS.orders):
        expected = index_plan(order, 1, **PLAN)
        np.testing.assert_array_equal(indices[:, place], expected[0])
        np.testing.assert_array_equal(mask[:, place], expected[1])
    assert (indices[:, 0] != indices[:, 1]).any()


def test_a_summary_has_means_standard_deviations_and_each_seed():
    each = [{"top1": 1.0, "num_images": 8}, {"top1": 4.0, "num_images": 8}]
    found = SEEDS.summary(each)
    assert found.pop("seeds") == [{"seed": 5, **each[0]}, {"seed": 6, **each[1]}]
    # sqrt(((1 - 2.5)^2 + (4 - 2.5)^2) / (2 - 1)); the number of images is no measurement.
    assert found == {"top1": 2.5, "top1_sd": pytest.approx(math.sqrt(4.5)), "num_images": 8}


def test_a_row_of_a_table_has_a_column_for_every_value_of_a_seed():
    record = {"epoch": 0, "test_top1": 2.0, "seeds": [{"seed": 5, "test_top1": 1.0}, {"seed": 6, "test_top1": 3.0}]}
    row = {"epoch": 0, "test_top1": 2.0, "seed_5/test_top1": 1.0, "seed_6/test_top1": 3.0}
    assert table_row(record) == row
    assert table_row(row) == row


def test_shapes_and_parts_are_those_of_the_stack():
    trees = [{"w": jnp.full((2, 3), float(index)), "key": jax.random.key(index)} for index in range(2)]
    stacked = SEEDS.stack(trees)
    shapes = SEEDS.shapes(jax.eval_shape(lambda: trees[0]))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), stacked) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    tiny.assert_equal(SEEDS.unstack(stacked), trees)


# ---- programs


def run_both(parts: StepParts, teachers: list[Any] | None, *, shared: Any = None, length: int = 1) -> None:
    """Compares the steps of an epoch, ``length`` a dispatch, of two seeds together and of each alone."""
    own = teachers is not None
    together = compile_train_steps(parts, DEVICES, seeds=dataclasses.replace(SEEDS, own_teachers=own))
    alone = compile_train_steps(parts, DEVICES)
    indices, mask = SEEDS.index_plan(0, **PLAN)
    constants, both = tiny.constants(DATA, SEEDS.stack(teachers) if own else shared), state(parts, (0, 1))
    for begin in range(0, STEPS, length):
        dispatch = slice(begin, begin + length)
        both, of_both = together(both, constants, indices[dispatch], mask[dispatch])
    for place in range(2):
        one, constants = state(parts, place), tiny.constants(DATA, teachers[place] if own else shared)
        for begin in range(0, STEPS, length):
            dispatch = slice(begin, begin + length)
            one, of_one = alone(one, constants, indices[dispatch, place], mask[dispatch, place])
        assert_close(SEEDS.unstack(both)[place], one)
        assert_close({name: value[:, place] for name, value in of_both.items()}, of_one)
        assert one.steps_done == both.steps_done == STEPS


@pytest.mark.parametrize("length", [1, STEPS])
def test_each_seed_takes_the_steps_it_takes_alone(length):
    run_both(PARTS, None, length=length)


def test_each_seed_takes_the_steps_it_takes_alone_with_batches_in_parts():
    run_both(dataclasses.replace(PARTS, accumulation_steps=2), None)


@pytest.mark.parametrize("own", [True, False])
def test_each_seed_learns_from_its_own_teacher_or_all_from_one(own):
    parts = tiny.parts(chosen=STAGE, objectives=(CrossEntropy(weight=0.5), Distillation(weight=8.0, temperature=4.0)))
    parts = dataclasses.replace(parts, teacher=parts.network)
    teachers = [variables(11), variables(12)]
    run_both(parts, teachers if own else None, shared=None if own else teachers[0])


def test_the_end_of_an_epoch_clears_the_sums_of_every_seed():
    both = state(PARTS, (0, 1))
    sums = {name: value + jnp.asarray([1, 2], value.dtype) for name, value in both.metric_sums.items()}
    cleared = compile_end_of_epoch(PARTS.objectives, DEVICES, seeds=SEEDS)(both.replace(metric_sums=sums))
    tiny.assert_equal(cleared.metric_sums, state(PARTS, (0, 1)).metric_sums)


def make_evaluator(seeds: Seeds) -> Evaluator:
    return Evaluator(
        PARTS.network,
        prepare=tiny.prepare_for_evaluation,
        splits={"test": DATA.test},
        batch_size=4,
        devices=DEVICES,
        seeds=seeds,
    )


def test_an_evaluation_of_several_seeds_says_what_the_evaluation_of_each_says():
    each = [variables(5), variables(6)]
    together, alone = make_evaluator(SEEDS)(SEEDS.stack(each), "test"), make_evaluator(ONE_SEED)
    assert together is not None
    for row, own in zip(together["seeds"], each, strict=True):
        assert {key: value for key, value in row.items() if key != "seed"} == pytest.approx(alone(own, "test"))
    assert together["top1"] == np.mean([row["top1"] for row in together["seeds"]])
    assert together["num_images"] == 10


# ---- the loop


@functools.cache
def evaluator_of(count: int) -> Evaluator:
    return make_evaluator(SEEDS if count == 2 else ONE_SEED)


def fit(folder: Path, which: Any, *, looks: float = math.inf, first: TrainState | None = None) -> TrainState:
    """What a process does for one seed (its place) or for both (a tuple), until a signal comes at the n-th look."""
    chosen = SEEDS if which == (0, 1) else Seeds((SEEDS.names[which],), (SEEDS.orders[which],), (0,))
    start, meta = first or state(PARTS, which), None
    with CheckpointStore(folder / "checkpoints") as store:
        if store.latest_step() is not None:
            start, meta = store.restore(jax.eval_shape(lambda: start))
            start = DEVICES.replicate(start)
        loop = StageLoop(
            tiny.setup(STAGE, PARTS, DATA, seeds=chosen),
            teacher={},
            evaluator=evaluator_of(chosen.count),
            store=store,
            metrics_path=folder / "metrics.jsonl",
            options=LoopOptions(checkpoint_seconds=1000.0),
            devices=DEVICES,
        )
        return loop.fit(start, StopAfter(looks), meta=meta)


def records(folder: Path) -> list[dict[str, Any]]:
    rows = metrics.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in rows]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, TrainState]:
    """A run of two seeds that nothing interrupted, and its final state."""
    folder = tmp_path_factory.mktemp("both")
    return folder, fit(folder, (0, 1))


@pytest.mark.parametrize("place", [0, 1])
def test_a_stage_of_several_seeds_is_for_each_the_stage_it_is_alone(tmp_path, both, place):
    folder, together = both
    assert_close(SEEDS.unstack(together)[place], fit(tmp_path, place))
    for record, alone in zip(records(folder), records(tmp_path), strict=True):
        own = record["seeds"][place]
        assert own.pop("seed") == SEEDS.names[place]
        assert own == pytest.approx({key: alone[key] for key in own}, rel=1e-5)
        assert {"train_loss", "train_top1", "test_loss", "test_top1", "test_top5"} <= own.keys()


def test_a_record_has_the_usual_keys_with_means_and_their_deviations(both):
    for record in records(both[0]):
        losses = [row["test_loss"] for row in record["seeds"]]
        assert losses[0] != losses[1]
        assert record["test_loss"] == pytest.approx(np.mean(losses))
        assert record["test_loss_sd"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
        assert {"epoch", "step", "learning_rate", "train_top1_sd", "test_top1_sd", "train_loss_sd"} <= record.keys()


# In the first step; in the second epoch; in the evaluation of the first epoch.
@pytest.mark.parametrize("looks", [1, STEPS + 4, STEPS + 1])
def test_a_stopped_run_of_several_seeds_ends_bit_for_bit_as_if_nothing_had_happened(tmp_path, both, looks):
    with pytest.raises(Interrupted):
        fit(tmp_path, (0, 1), looks=looks)
    tiny.assert_equal(jax.device_get(fit(tmp_path, (0, 1))), jax.device_get(both[1]))
    assert records(tmp_path) == records(both[0])


def test_a_loss_that_is_not_finite_names_its_seed(tmp_path):
    start = state(PARTS, (0, 1))
    start = start.replace(params=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), start.params))
    with pytest.raises(NonFiniteLossError, match="the loss of seed 6 is not finite at step 0; last metrics: none yet"):
        fit(tmp_path, (0, 1), first=start)
    assert CheckpointStore(tmp_path / "checkpoints", read_only=True).steps() == []


def test_a_last_step_that_breaks_one_seed_names_it(tmp_path, monkeypatch):
    evaluate = StageLoop._evaluate

    def break_and_evaluate(self: StageLoop, state: TrainState, *args: Any) -> Any:
        params = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), state.params)
        return evaluate(self, state.replace(params=params), *args)

    monkeypatch.setattr(StageLoop, "_evaluate", break_and_evaluate)
    with pytest.raises(NonFiniteLossError, match="the loss of seed 5 is not finite at step 3"):
        fit(tmp_path, (0, 1))
    assert CheckpointStore(tmp_path / "checkpoints", read_only=True).steps() == []
