"""Every file of ``configs/``: its stages are the recorded ones, and every stage runs one training step in shapes.

``UPDATE_GOLDEN=1 pytest tests/configs`` records the stages anew: a changed hyper-parameter then shows in the diff.
"""

import dataclasses
import functools
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnn_jax import data, networks
from bnn_jax.data.memory import ImageSource, Split
from bnn_jax.experiment import start
from bnn_jax.experiment.build import Experiment, make_experiment, set_up
from bnn_jax.experiment.config import validate
from bnn_jax.quantizers.base import Shape
from bnn_jax.stages import QuantSpec, Spec, Stage, parse_reference, to_json
from bnn_jax.training.devices import all_devices
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, train_step
from tests.conftest import ROOT

GOLDEN = Path(__file__).parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))
VARIANTS = ("", "smoke")
# Their teacher is a file; the smoke variant, which needs no file, trains it first.
TEACHER_FROM_FILE = {"snn_resnet18", "basq_mobilenet_v2", "basq_mobilenet_v1", "basq_resnet18"}
UPDATE = os.environ.get("UPDATE_GOLDEN") == "1"

each_config = pytest.mark.parametrize("name", NAMES)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=["full", "smoke"])


def of_two_folds(stages: tuple[Stage, ...]) -> list[Stage]:
    """The stages without the winners of further folds: a smoke variant searches two."""
    return [stage for stage in stages if not re.fullmatch(r"finetune_([2-9]|\d\d)", stage.name)]


def run_of(name: str, variant: str = "") -> Experiment:
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    return make_experiment(validate(config.to_dict()))


# ---- the stages as data


@each_config
def test_the_stages_are_the_recorded_ones(name):
    path = GOLDEN / f"{name}.json"
    stages = [to_json(stage) for stage in run_of(name).stages]
    if UPDATE:
        path.write_text(json.dumps(stages, indent=1) + "\n", encoding="utf-8")
    assert path.exists(), f"record the new config with UPDATE_GOLDEN=1 pytest {Path(__file__).relative_to(ROOT)}"
    assert json.loads(json.dumps(stages)) == json.loads(path.read_text(encoding="utf-8"))


def test_nothing_is_recorded_of_configs_that_are_gone():
    assert {path.stem for path in GOLDEN.glob("*.json")} <= set(NAMES)


@each_config
def test_the_smoke_variant_runs_two_steps_an_epoch_on_generated_images(name):
    full, smoke = run_of(name), run_of(name, "smoke")
    first = ["teacher"] if name in TEACHER_FROM_FILE else []
    assert [stage.name for stage in smoke.stages] == first + [stage.name for stage in of_two_folds(full.stages)]
    for stage in smoke.stages:
        # Two epochs where the second uses what the first collected (the label bank).
        assert stage.data.name == "synthetic" and stage.optim.epochs <= 2
        trained = stage.data.num_train - round(stage.data.validation_fraction * stage.data.num_train)
        assert trained == 2 * stage.optim.batch_size


@each_config
def test_the_real_smoke_variant_differs_in_the_images_only(name):
    stages, real = (run_of(name, variant).stages for variant in ("smoke", "smoke_real"))
    own = run_of(name).stages[-1].data
    for stage in real:
        assert (stage.data.name, stage.data.augment, stage.data.lighting) == (own.name, own.augment, own.lighting)
        assert dict(stage.data.options) == dict(own.options)
    same_images = [dataclasses.replace(new, data=old.data) for new, old in zip(real, stages, strict=True)]
    assert same_images == list(stages)


@each_config
def test_another_variant_is_refused(name):
    with pytest.raises(ValueError, match="accepted behind the colon is 'smoke' or 'smoke_real'"):
        importlib.import_module(f"configs.{name}").get_config("smok")


@each_config
def test_the_header_says_what_it_is_compared_with_and_how_to_run_it(name):
    header = importlib.import_module(f"configs.{name}").__doc__
    assert f"--config=configs/{name}.py" in header
    assert "ublished" in header or "compare" in header


@each_config
@each_variant
def test_runs_have_folders_of_their_own(name, variant):
    names = [run_of(other, v).config["name"] for other in NAMES for v in (*VARIANTS, "smoke_real")]
    assert names.count(run_of(name, variant).config["name"]) == 1


# ---- one training step in shapes


def stand_in(stage: Stage) -> ImageSource:
    """A source of the stage's image shape and classes, with a handful of images that nothing looks at."""
    image_shape, num_classes = data.describe(stage.data)
    images = Split(np.zeros((4, *image_shape), np.uint8), np.zeros(4, np.int32))
    return ImageSource(
        name=stage.data.name,
        num_classes=num_classes,
        train=images,
        test=images,
        validation=None,
        mean=(0.5,) * image_shape[2],
        std=(0.25,) * image_shape[2],
        augment=stage.data.augment,
        pad=image_shape[0] // 8,
        fingerprint="",
    )


@functools.cache
def variable_shapes(network: Spec, quant: QuantSpec, described: tuple[Shape, int], compute_dtype: str) -> Any:
    """Shapes of the variables of a network; rungs and variants share many of them, and a trace takes a second."""
    image_shape, num_classes = described
    built = networks.build(network, quant, num_classes=num_classes, compute_dtype=compute_dtype)
    return start.variable_shapes(built, image_shape)


def variable_shapes_of(stage: Stage) -> Any:
    return variable_shapes(stage.network, stage.quant, data.describe(stage.data), stage.compute_dtype)


def winner_shape(network: Any) -> jax.ShapeDtypeStruct:
    """Shape of a path of a supernet."""
    return jax.ShapeDtypeStruct((len(network.branch_patterns),), jnp.int32)


@functools.cache
def shapes_of_one_step(name: str, index: int) -> tuple[TrainState, TrainState, dict[str, Any]]:
    """Shapes of the state of a stage before and after a step, and of the step's metrics."""
    run = run_of(name)
    stage = run.stages[index]
    setup = set_up(run, stage, stand_in(stage))
    source = setup.source
    teacher = {} if stage.teacher is None else variable_shapes_of(run.teacher_stage(stage))
    constants = Constants(
        images=jax.ShapeDtypeStruct(source.train.images.shape, jnp.uint8),
        labels=jax.ShapeDtypeStruct(source.train.labels.shape, jnp.int32),
        teacher=teacher,
        choice=winner_shape(setup.network) if stage.trains_winner else None,
    )
    rows = (jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.bool_))
    before = start.state_shapes(setup, all_devices())
    after, metrics = jax.eval_shape(functools.partial(train_step, setup.parts), before, constants, *rows)
    return before, after, metrics


def shapes_and_types(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def first_second_and_last(name: str) -> list[int]:
    """Indices of the stages that are traced; the others differ from these in their bits."""
    count = len(run_of(name).stages)
    if name.startswith("basq_") and name != "basq_mobilenet_v2":
        # Tracing a supernet takes seconds; fine-tuning, the last stage, has all its parts.
        return [0, count - 1]
    return sorted({0, min(1, count - 1), count - 1})


@pytest.mark.parametrize(("name", "index"), [(name, index) for name in NAMES for index in first_second_and_last(name)])
def test_a_stage_runs_a_training_step_in_shapes(name, index):
    before, after, metrics = shapes_of_one_step(name, index)
    # A step that changed a shape or a type would compile again, or could not be restored.
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert shapes_and_types(after) == shapes_and_types(before)
    assert {value.shape for value in metrics.values()} == {()}


def program_of(stage: Stage) -> tuple[Any, ...]:
    """What the program of a training step depends on, besides the numbers of its schedules."""
    parts = (stage.network, stage.quant, stage.objectives, stage.optim.optimizer, stage.optim.groups, stage.projections)
    knobs = tuple((name, schedule.name) for name, schedule in stage.knobs)
    kind = (stage.kind, stage.choice, stage.optim.unselected_branches)
    return (*parts, *kind, knobs, stage.teacher is None, stage.compute_dtype, data.describe(stage.data))


# Its hidden layers are narrower: Adam's state of the full ones would be 150 MB in each checkpoint.
SMALLER_IN_SMOKE = {"skd_mnist_mlp"}


@pytest.mark.parametrize("name", sorted(SMALLER_IN_SMOKE))
def test_a_smaller_smoke_variant_has_the_same_parts(name):
    (full,), (smoke,) = (run_of(name, variant).stages for variant in VARIANTS)
    assert (smoke.quant, smoke.objectives, smoke.knobs) == (full.quant, full.objectives, full.knobs)
    assert (smoke.optim.optimizer, smoke.optim.groups) == (full.optim.optimizer, full.optim.groups)


@pytest.mark.parametrize("name", sorted(set(NAMES) - SMALLER_IN_SMOKE))
def test_the_smoke_variant_runs_the_same_programs(name):
    # So that what holds for the shapes of the one holds for those of the other.
    full, smoke = (run_of(name, variant).stages for variant in VARIANTS)
    own = smoke[name in TEACHER_FROM_FILE :]
    assert [program_of(stage) for stage in own] == [program_of(stage) for stage in of_two_folds(full)]
    if len(own) < len(smoke):
        assert (smoke[0].network, smoke[0].quant) == (full[0].teacher.network, full[0].teacher.quant)


def flat_shapes(stage: Stage, collection: str) -> dict[str, Any]:
    """Shape and type of every array of a collection, by path."""
    flat = flatten_dict(variable_shapes_of(stage)[collection], sep="/")
    return {f"{collection}/{path}": (leaf.shape, leaf.dtype) for path, leaf in flat.items()}


@each_config
def test_a_stage_starts_from_variables_of_the_shapes_it_copies(name):
    run = run_of(name)
    for stage in run.stages:
        if stage.inherit is None or parse_reference(stage.inherit.source).kind == "file":
            continue
        before = run.stage_behind(stage.inherit.source, stage)
        for collection in stage.inherit.collections:
            copied, own = (flat_shapes(s, collection) for s in (before, stage))
            new = {path for path in own if any(re.search(pattern, path) for pattern in stage.inherit.may_be_new)}
            # What may be new is new: a pattern that fits nothing, or something that is copied, would hide a mistake.
            assert not new & copied.keys()
            assert {path: shape for path, shape in own.items() if path not in new} == copied
