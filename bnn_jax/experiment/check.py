"""Checks of a run before anything is trained: what can be built, in shapes only."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from bnn_jax import data
from bnn_jax.errors import UserError
from bnn_jax.experiment import start
from bnn_jax.experiment.build import Run, check_knobs
from bnn_jax.stages import Stage, parse_reference


def check(run: Run) -> None:
    """Builds every stage once in shapes only, so that a mistake shows before anything is trained.

    Raises:
      UserError: what cannot be built.
    """
    if run.num_seeds > 1:
        check_seeds(run)
    built = set()
    for stage in run.stages:
        _check_files(stage)
        check_knobs(stage)
        if stage.kind == "train":
            run.network(stage, num_classes=run.describe(stage)[1], trained=True)
        # Tracing a large network takes seconds, and many stages may share one.
        key = (stage.network, stage.quant, run.describe(stage), stage.compute_dtype)
        if key not in built:
            network_of(run, stage)
        built.add(key)


def check_seeds(run: Run) -> None:
    """Checks that the seeds of a run can be trained in one program.

    Raises:
      UserError: they cannot.
    """
    what, count = f"config.num_seeds={run.num_seeds}", jax.device_count()
    if count > 1:
        raise UserError(f"{what}: accepted on {count} devices is 1; CUDA_VISIBLE_DEVICES may name one of them")
    for stage in run.stages:
        if stage.kind == "search":
            raise UserError(f"{what}: stage {stage.name} is a search; accepted with one is 1")
        if data.SOURCES[stage.data.name].streamed:
            raise UserError(f"{what}: the images of {stage.data.name} are read while training; accepted with them is 1")
        for index in range(run.num_seeds):
            other = run.alone(index).find(stage.name)
            if dataclasses.replace(other, seed=stage.seed, init_seed=stage.init_seed) != stage:
                raise UserError(f"{what}: stage {stage.name} of another seed is another stage; accepted is 1")
    if run.config["data"]["validation_fraction"] > 0:
        raise UserError(f"{what}: each seed would hold out other images; accepted is config.data.validation_fraction=0")


def _check_files(stage: Stage) -> None:
    """Looks whether the files exist that a stage starts from; what is in them shows when it reads them."""
    for field in ("init_from", "teacher"):
        reference = getattr(stage, field)
        parsed = None if reference is None else parse_reference(reference)
        if parsed is not None and parsed.kind == "file" and not Path(parsed.target).exists():
            raise UserError(f"stage {stage.name}: {field} {reference!r}: no such file or folder")


def network_of(run: Run, stage: Stage) -> tuple[Any, dict[str, Any]]:
    """The stage's network and the shapes of its variables.

    Raises:
      UserError: it cannot be built, or not for images of this size.
    """
    image_shape, num_classes = run.describe(stage)
    network = run.network(stage, num_classes=num_classes)
    try:
        return network, start.variable_shapes(network, image_shape)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        what = f"network {stage.network.name!r} with images of {'x'.join(map(str, image_shape))}"
        # Nothing is left of a feature map after too many strides, and a mean over it divides by zero.
        why = "they are too small" if isinstance(error, ZeroDivisionError) else " ".join(str(error).split())
        raise UserError(f"stage {stage.name}: {what}: {why}") from error
