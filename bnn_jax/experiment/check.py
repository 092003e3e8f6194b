"""What is checked before anything is trained: whether every stage can be built, and whether its files exist."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from bnn_jax import data
from bnn_jax.errors import UserError
from bnn_jax.experiment import adapt
from bnn_jax.experiment.build import Experiment, build_network, check_knobs, described_network, of_seed
from bnn_jax.experiment.load import naming_what_fits, read_variables
from bnn_jax.stages import Stage, parse_reference
from bnn_jax.training.frozen import check_patterns, matching

# Keys that need a package which is not always there: its module, and the extra that installs it.
PACKAGES = {
    ("data", "color_jitter"): ("dm_pix", "augment"),
    ("log", "tensorboard"): ("tensorboardX", "tensorboard"),
    ("log", "wandb"): ("wandb", "wandb"),
}


def check(experiment: Experiment) -> None:
    """Builds every stage once in shapes only, so that a mistake shows before anything is trained.

    Raises:
      UserError: what cannot be built.
    """
    check_packages(experiment.config)
    check_seeds(experiment)
    built, paths = set(), set()
    for stage in experiment.stages:
        _check_files(stage)
        check_knobs(stage)
        if stage.kind == "train":
            build_network(stage, experiment.describe(stage)[1], trained=True)
        # Tracing a large network takes seconds, and many stages may share one.
        key = (stage.network, stage.quant, experiment.describe(stage), stage.compute_dtype)
        if key not in built or stage.freeze or adapt.source_of(stage):
            network, shapes = described_network(experiment, stage)
            paths.update(_check_start(experiment, stage, network, shapes))
        built.add(key)
    check_patterns(experiment.config["freeze"], sorted(paths))


def _check_start(experiment: Experiment, stage: Stage, network: Any, shapes: dict[str, Any]) -> list[str]:
    """Looks whether a stage can start from its file; returns the paths of its parameters if some are frozen.

    Raises:
      CheckpointError: the file is damaged or of another network.
      UserError: all parameters are frozen.
    """
    if path := adapt.source_of(stage):
        image_shape, _ = experiment.describe(stage)
        with naming_what_fits(image_shape, path):
            adapt.plan(stage, read_variables(path), shapes, branches=getattr(network, "branches", 1))
    paths = list(adapt.flat_arrays(shapes["params"]))
    frozen = matching(stage.freeze, paths)
    if stage.freeze and stage.kind == "train" and len(frozen) == len(paths):
        raise UserError(f"config.freeze={stage.freeze!r}: nothing is left to train in stage {stage.name}")
    return paths if stage.freeze else []


def check_packages(config: Mapping[str, Any]) -> None:
    """Imports the packages that a config asks for.

    Raises:
      UserError: one is not installed, or not whole.
    """
    for (section, name), (module, extra) in PACKAGES.items():
        if not config[section][name]:
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            what = f"config.{section}.{name}={config[section][name]!r}"
            raise UserError(f"{what}: {' '.join(str(error).split())}; `pip install 'bnn_jax[{extra}]'`") from None


def check_seeds(experiment: Experiment) -> None:
    """Checks that the seeds of an experiment, if there are several, can be trained in one program.

    Raises:
      UserError: they cannot.
    """
    count, devices = experiment.config["num_seeds"], jax.device_count()
    if count == 1:
        return
    what = f"config.num_seeds={count}"
    if devices > 1:
        raise UserError(f"{what}: accepted on {devices} devices is 1; CUDA_VISIBLE_DEVICES may name one of them")
    for stage in experiment.stages:
        if stage.kind == "search":
            raise UserError(f"{what}: stage {stage.name} is a search; accepted with one is 1")
        config = experiment.config
        if data.reads_while_training(stage.data, data_dir=config["data"]["data_dir"], seed=config["seed"]):
            raise UserError(f"{what}: the images of {stage.data.name} are read while training; accepted with them is 1")
        for index in range(count):
            other = of_seed(experiment, index).find(stage.name)
            if dataclasses.replace(other, seed=stage.seed, init_seed=stage.init_seed) != stage:
                raise UserError(f"{what}: stage {stage.name} of another seed is another stage; accepted is 1")
    for key in ("validation_fraction", "test_fraction"):
        if experiment.config["data"][key]:
            raise UserError(f"{what}: each seed would hold out other images; accepted is config.data.{key}=0")


def _check_files(stage: Stage) -> None:
    """Looks whether the files exist that a stage starts from; what is in them shows when it reads them."""
    for name, record in (("init_from", stage.inherit), ("teacher", stage.teacher)):
        parsed = None if record is None else parse_reference(record.source)
        if parsed is not None and parsed.kind == "file" and not Path(parsed.target).exists():
            raise UserError(f"stage {stage.name}: {name} {record.source!r}: no such file or folder")
