"""Training and evaluating paths of a small supernet through the library's own steps."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import networks, objectives
from bnn_jax.data.memory import Split
from bnn_jax.experiment import start
from bnn_jax.methods import basq
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import OptimSpec, QuantSpec, spec
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import Evaluator, PathEvaluator
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.step import Constants, StepParts, compile_train_steps, uniform_choice
from tests.conftest import ROOT

GENES, BRANCHES, CLASSES, BATCH = 2, 3, 4, 4
NETWORK = networks.build(
    spec("basq_resnet8_cifar", stage_sizes=(1,), widths=(4,), stem_width=4, branches=BRANCHES),
    QuantSpec(weight=spec("lsq", bits=2), act=spec("lsq", bits=2), searched=spec("branch_clip", bits=2)),
    num_classes=CLASSES,
)
RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (10, 4, 4, 3)).astype(np.uint8)
LABELS = RANDOM.randint(CLASSES, size=10).astype(np.int32)


def prepare(images, key=None):
    return jnp.asarray(images, jnp.float32) / 128 - 1


@functools.cache
def variables():
    """Random variables in which every branch differs."""
    random = np.random.RandomState(1)

    def draw(path, leaf):
        value = random.uniform(0.5, 1.5, leaf.shape)
        return np.asarray(value - (path[-1].key == "kernel"), np.float32)

    return jax.tree_util.tree_map_with_path(draw, start.variable_shapes(NETWORK, (4, 4, 3)))


@functools.cache
def parts(unselected: str = "decay") -> StepParts:
    optim = OptimSpec(
        spec("adam"),
        spec("constant", value=0.0),
        1,
        BATCH,
        groups=basq.supernet_groups((1e-2, 1e-3, 1e-4), weight_decay=5e-6),
        unselected_branches=unselected,
    )
    optimizer = make_optimizer(
        optim, variables()["params"], schedule=lambda step: 1e-3, branch_patterns=NETWORK.branch_patterns
    )
    return StepParts(NETWORK, (objectives.build(spec("cross_entropy", weight=1.0)),), optimizer, prepare)


def state_of(step_parts: StepParts):
    return start.create_state(
        jax.tree.map(jnp.array, variables()),
        optimizer=step_parts.optimizer,
        objectives=step_parts.objectives,
        num_classes=CLASSES,
        seed=0,
        devices=all_devices(),
    )


def constants(choice=None) -> Constants:
    choice = None if choice is None else jnp.asarray(choice, jnp.int32)
    return Constants(jnp.asarray(IMAGES), jnp.asarray(LABELS), {}, choice)


ROWS = (np.arange(BATCH, dtype=np.int32)[None], np.ones((1, BATCH), bool))


@pytest.mark.parametrize("unselected", ["decay", "freeze"])
def test_one_program_trains_two_hundred_paths(unselected):
    step_parts = parts(unselected)
    run, state = compile_train_steps(step_parts, all_devices()), state_of(step_parts)
    for choice in np.random.RandomState(3).randint(BRANCHES, size=(200, GENES)):
        state, metrics = run(state, constants(choice), *ROWS)
    assert run._cache_size() == 1
    assert int(state.step) == 200
    assert np.isfinite(metrics["loss"]).all()


def after_one_step(unselected, choice):
    step_parts = parts(unselected)
    state, _ = compile_train_steps(step_parts, all_devices())(state_of(step_parts), constants(choice), *ROWS)
    return jax.device_get(state)


def moved_rows(state, leaf_name):
    """Which branches of each searched layer have moved, by the named leaf."""
    rows = []
    for unit in NETWORK.searched_units:
        place, old = state.variables, variables()
        for key in (*leaf_name.split("/")[:1], unit, *leaf_name.split("/")[1:]):
            place, old = place[key], old[key]
        rows.append([not np.array_equal(a, b) for a, b in zip(place, old)])
    return rows


def test_only_the_chosen_branches_move_where_the_others_are_frozen():
    state = after_one_step("freeze", (2, 0))
    expected = [[False, False, True], [True, False, False]]
    for leaf in ("params/norm_in/scale", "params/norm_out/bias", "batch_stats/norm_last/mean"):
        assert moved_rows(state, leaf) == expected


def test_decay_moves_every_clip_value_and_only_the_chosen_statistics():
    state = after_one_step("decay", (2, 0))
    assert moved_rows(state, "params/conv/act_quantizer/upper_bound") == [[True] * BRANCHES] * GENES
    assert moved_rows(state, "batch_stats/norm_in/var") == [[False, False, True], [True, False, False]]


def test_every_step_draws_its_branches_anew_and_all_alike():
    draw = jax.jit(jax.vmap(uniform_choice(GENES, BRANCHES), in_axes=(0, None)))
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 3000), 0))
    assert draws.shape == (3000, GENES) and draws.dtype == np.int32
    counts = np.array([np.bincount(column, minlength=BRANCHES) for column in draws.T])
    # 1,000 expected; five standard deviations of a binomial law are 129.
    assert np.all(np.abs(counts - 1000) < 130)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.1


def test_a_step_takes_the_branches_it_draws():
    step_parts = dataclasses.replace(parts("freeze"), choose=lambda key, step: jnp.array([1, 1]))
    run = compile_train_steps(step_parts, all_devices())
    state, _ = run(state_of(step_parts), constants(), *ROWS)
    assert moved_rows(jax.device_get(state), "batch_stats/norm_in/var") == [[False, True, False]] * GENES


# ---- evaluation

PATHS = [(a, b) for a in range(BRANCHES) for b in range(BRANCHES)]


@functools.cache
def expected_top1(path, images):
    x = prepare(IMAGES[list(images)])
    logits = NETWORK.apply(variables(), x, QuantContext(choice=jnp.asarray(path))).logits
    return 100.0 * np.mean(np.argmax(logits, axis=-1) == LABELS[list(images)])


def population(**options):
    split = Split(IMAGES, LABELS)
    return PathEvaluator(NETWORK, prepare=prepare, split=split, devices=all_devices(), **options)


def check_population(paths_at_once):
    """Fails unless a population has the accuracies of its paths, by one program."""
    images = (9, 2, 3, 4, 7)
    evaluate = population(batch_size=2, paths_at_once=paths_at_once)
    found = evaluate(all_devices().replicate(variables()), PATHS, np.array(images))
    assert found == [expected_top1(path, images) for path in PATHS]
    assert evaluate._step._cache_size() == 1


@pytest.mark.parametrize("paths_at_once", [1, 4, 9, 20])
def test_a_population_is_evaluated_as_its_paths_one_by_one(paths_at_once):
    check_population(paths_at_once)


@pytest.mark.slow
def test_a_population_is_divided_among_the_devices():
    program = (
        "import jax; from tests.training import supernet_test; assert jax.device_count() == 4; "
        "supernet_test.check_population(paths_at_once=3)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_an_evaluation_asked_to_stop_has_no_result():
    asked = []
    evaluate = population(batch_size=2, paths_at_once=4)
    result = evaluate(
        all_devices().replicate(variables()), PATHS, np.arange(6), should_stop=lambda: len(asked) > 3 or asked.append(0)
    )
    assert result is None


@pytest.mark.parametrize("path", [(0, 0), (2, 1)])
def test_the_evaluator_takes_the_path_it_is_given(path):
    evaluate = Evaluator(
        NETWORK,
        prepare=prepare,
        splits={"test": Split(IMAGES, LABELS)},
        batch_size=4,
        devices=all_devices(),
        choice=path,
    )
    result = evaluate(all_devices().replicate(variables()), "test")
    assert result["top1"] == expected_top1(path, tuple(range(10)))
