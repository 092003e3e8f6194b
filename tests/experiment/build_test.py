"""From a stage to the parts of its training step: projections, and a teacher that is a file."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax.errors import CheckpointError, UserError
from bnn_jax.experiment import start
from bnn_jax.experiment.build import make_experiment, set_up
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import SavedVariables
from bnn_jax.networks import build
from bnn_jax.quantizers import QuantContext
from bnn_jax.stages import QuantSpec, Teacher, spec
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training.devices import all_devices
from bnn_jax.training.loop import Setup
from bnn_jax.training.projections import RefillCodebooks
from configs import snn_resnet20
from tests.configs.configs_test import stand_in

TEACHER = spec("standard_resnet20", stage_sizes=(1, 1, 1), widths=(4, 4, 4))
IMAGES = np.random.RandomState(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


EXPERIMENT = make_experiment(validate(snn_resnet20.get_config("smoke").to_dict()))


def set_up_with(**changes: Any) -> Setup:
    """The last stage of SNN with some of its fields changed."""
    stage = dataclasses.replace(EXPERIMENT.stages[-1], **changes)
    return set_up(EXPERIMENT, stage, stand_in(stage))


def teacher_variables(setup: Setup, folder: Path) -> dict[str, Any]:
    return SavedVariables(EXPERIMENT, RunFolder(folder, EXPERIMENT.stages)).of_teacher(setup)


def save(folder: Path, network: Any) -> dict[str, Any]:
    """Saves fresh variables of a network as a checkpoint, and returns them."""
    variables = start.init_variables(network, jax.random.key(1), jnp.asarray(IMAGES))
    state = start.create_state(
        variables, optimizer=optax.identity(), objectives=(), num_classes=10, seed=0, devices=all_devices()
    )
    with CheckpointStore(folder) as store:
        store.save(state, meta={}, metrics=None)
    return variables


def test_the_projections_of_a_stage_are_built() -> None:
    setup = set_up_with(projections=(spec("refill_codebooks", maintenance="release"),))
    assert setup.parts.projections == (RefillCodebooks("release"),)
    assert set_up_with(projections=()).parts.projections == ()


def test_a_teacher_file_may_be_of_another_network_in_full_precision(tmp_path) -> None:
    network = build(TEACHER, QuantSpec(), num_classes=10)
    variables = save(tmp_path / "teacher", network)
    setup = set_up_with(teacher=Teacher(f"file:{tmp_path / 'teacher'}", TEACHER))
    own = teacher_variables(setup, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, own["params"], variables["params"])
    logits = setup.parts.teacher.apply(own, IMAGES, QuantContext()).logits
    np.testing.assert_array_equal(logits, network.apply(variables, IMAGES, QuantContext()).logits)


def test_without_a_network_of_its_own_a_teacher_file_is_of_the_stages_network(tmp_path) -> None:
    save(tmp_path / "teacher", build(TEACHER, QuantSpec(), num_classes=10))
    setup = set_up_with(teacher=Teacher(f"file:{tmp_path / 'teacher'}"))
    shapes = start.variable_shapes(setup.parts.teacher, IMAGES.shape[1:])
    assert jax.tree.structure(shapes) == jax.tree.structure(setup.shapes)
    with pytest.raises(CheckpointError, match="another network"):
        teacher_variables(setup, tmp_path)


def test_an_objective_that_needs_a_teacher_needs_one() -> None:
    with pytest.raises(UserError, match="stage sub_bit: an objective needs a teacher, and the stage names none"):
        set_up_with(teacher=None)


def test_what_a_stage_says_of_its_images_and_of_an_average_reaches_the_step() -> None:
    stage = EXPERIMENT.stages[-1]
    setup = set_up_with(
        data=dataclasses.replace(stage.data, mixup=0.2, color_jitter=0.3),
        optim=dataclasses.replace(stage.optim, ema_decay=0.9),
    )
    assert (setup.parts.mixup, setup.parts.ema_decay) == (0.2, 0.9)
    assert setup.parts.prepare.keywords["color_jitter"] == 0.3
