"""Accuracy of a stage, or of a checkpoint, on the test images."""

import dataclasses
from pathlib import Path
from typing import Any

from bnn_jax import hosts
from bnn_jax.errors import UserError
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment.build import (
    Run,
    load_checkpoint,
    make_evaluator,
)
from bnn_jax.experiment.check import check_seeds, network_of
from bnn_jax.stages import Stage
from bnn_jax.training import seeds
from bnn_jax.training.devices import all_devices


def evaluate(run: Run, *, stage_name: str | None = None, checkpoint: Path | None = None) -> dict[str, Any]:
    """Accuracy on the test images of a checkpoint, or of a stage of the run.

    Args:
      run: the run; its folder is not looked at when ``checkpoint`` is given.
      stage_name: 'w4a4' or 'w4a4@best'; None is the last stage (with a checkpoint) or the last finished one.
      checkpoint: file of one network's variables, or folder of saved ones, of as many seeds as the config says.

    Returns:
      ``top1`` and ``top5`` in percent, ``loss``, ``num_images``, ``stage``, ``checkpoint``; of several seeds as
      ``Seeds.summary`` says.

    Raises:
      UserError: nothing to evaluate, or it does not fit.
    """
    name, _, which = (stage_name or "").partition("@")
    if which not in ("", "last", "best"):
        raise UserError(f"--stage={stage_name}: accepted behind the @ are last, best")
    if checkpoint is not None:
        stage = run.find(name) if name else run.stages[-1]
    else:
        run_folder.check_owner(run.folder, run.config, run.stages)
        stage = run.find(name or hosts.from_first("last stage", lambda: _last_finished(run).name))
    if stage.kind == "search":
        raise UserError(
            f"--stage={stage.name}: it searches and trains nothing to evaluate; its results are in --mode=report"
        )
    if run.num_seeds > 1:
        check_seeds(run)
    if checkpoint is not None and checkpoint.is_file():
        run = run.alone(0)
    # The variables are read before the images: a wrong checkpoint shows at once.
    network, shapes = network_of(run, stage)
    if checkpoint is not None:
        variables, path = load_checkpoint(checkpoint, seeds.stack_shapes(shapes, run.num_seeds)), checkpoint
    else:
        variables = run.load_variables(f"stage:{stage.name}@{which or 'last'}", shapes)
        path = run.checkpoints(stage)
    devices = all_devices()
    evaluator = make_evaluator(run, stage, network, run.load_data(only_test(stage)), devices, only_test=True)
    result = evaluator(devices.replicate(variables), "test")
    assert result is not None  # only asked to stop could it be
    return {**result, "stage": stage.name, "checkpoint": str(path)}


def _last_finished(run: Run) -> Stage:
    for stage in reversed(run.stages):
        if stage.kind == "train" and run_folder.read_result(run.stage_folder(stage)) is not None:
            return stage
    raise UserError(f"{run.folder}: no finished stage to evaluate; train first, or give --checkpoint")


def only_test(stage: Stage) -> Stage:
    """The stage with one training image: evaluation needs none, and decoding them all takes most of the time."""
    return dataclasses.replace(stage, data=dataclasses.replace(stage.data, num_train=1, validation_fraction=0.0))
