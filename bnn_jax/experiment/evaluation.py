"""Accuracy of a stage, or of a checkpoint, on the test images."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from bnn_jax import hosts, run_files
from bnn_jax.data.augment import prepare_eval
from bnn_jax.data.memory import ImageSource
from bnn_jax.errors import UserError
from bnn_jax.experiment import folder as files
from bnn_jax.experiment.build import Experiment, described_network, of_seed, seeds_of
from bnn_jax.experiment.check import check_seeds
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import SavedVariables, load_checkpoint, load_images, normalization_of
from bnn_jax.experiment.search import folds_of, searched_split
from bnn_jax.stages import DataSpec, Stage, parse_choice
from bnn_jax.training.devices import Devices, all_devices
from bnn_jax.training.evaluate import Evaluator


def evaluate(
    experiment: Experiment, folder: RunFolder, *, stage_name: str | None = None, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Accuracy on the test images of a checkpoint, or of a stage of the run.

    Args:
      experiment: the experiment.
      folder: its run folder; not looked at when ``checkpoint`` is given.
      stage_name: 'w4a4' or 'w4a4@best'; None is the last stage (with a checkpoint) or the last finished one.
      checkpoint: file of one network's variables, or folder of saved ones, of as many seeds as the config says.

    Returns:
      ``top1`` and ``top5`` in percent, ``loss``, ``num_images``, ``stage``, ``checkpoint``; of several seeds as
      ``Seeds.summary`` says.

    Raises:
      UserError: nothing to evaluate, or it does not fit.
    """
    found = read_stage(experiment, folder, stage_name=stage_name, checkpoint=checkpoint)
    stage = found.stage
    if found.of_one_seed:
        experiment = of_seed(experiment, 0)
    normalization = normalization_of(experiment, folder, stage) if found.trained_here else None
    devices, source = all_devices(), load_images(experiment.config, only_test(stage.data), normalization)
    evaluator = make_evaluator(experiment, folder, stage, found.network, source, devices, only_test=True)
    result = evaluator(devices.replicate(found.variables), "test")
    assert result is not None  # only asked to stop could it be
    return {**result, "stage": stage.name, "checkpoint": str(found.path)}


@dataclasses.dataclass(frozen=True)
class StageVariables:
    """A stage, its network, and variables of it that were read.

    Attributes:
      stage: the stage.
      network: its network.
      variables: the variables; of several seeds stacked.
      path: where they come from.
      trained_here: whether the stage's own training made them.
      of_one_seed: whether they are of one network whatever the number of seeds.
    """

    stage: Stage
    network: Any
    variables: dict[str, Any]
    path: Path
    trained_here: bool
    of_one_seed: bool


def read_stage(
    experiment: Experiment, folder: RunFolder, *, stage_name: str | None, checkpoint: Path | None
) -> StageVariables:
    """Reads the variables of a checkpoint, or of a stage of the run; ``evaluate`` says what the arguments mean.

    Raises:
      UserError: there are none, or they do not fit.
    """
    name, _, which = (stage_name or "").partition("@")
    if which not in ("", "last", "best"):
        raise UserError(f"--stage={stage_name}: accepted behind the @ are last, best")
    if checkpoint is None:
        files.check_owner(folder.path, experiment.config, experiment.stages)
        name = name or hosts.from_first("last stage", lambda: _last_finished(experiment, folder))
    stage = experiment.find(name) if name else experiment.stages[-1]
    if stage.kind == "search":
        raise UserError(
            f"--stage={stage.name}: it searches and trains nothing to evaluate; its results are in --mode=report"
        )
    check_seeds(experiment)
    of_one_seed = checkpoint is not None and checkpoint.is_file()
    if of_one_seed:
        experiment = of_seed(experiment, 0)
    # The variables are read before the images: a wrong checkpoint shows at once.
    (network, shapes), seeds = described_network(experiment, stage), seeds_of(experiment, stage)
    if checkpoint is not None:
        shape, _ = experiment.describe(stage)
        variables, path = load_checkpoint(checkpoint, seeds.shapes(shapes), image_shape=shape), checkpoint
    else:
        saved, path = SavedVariables(experiment, folder), folder.checkpoints(stage.name)
        variables = saved.load(f"stage:{stage.name}@{which or 'last'}", shapes, seeds)
    return StageVariables(stage, network, variables, path, checkpoint is None, of_one_seed)


def _last_finished(experiment: Experiment, folder: RunFolder) -> str:
    for stage in reversed(experiment.stages):
        if stage.kind == "train" and folder.result(stage.name) is not None:
            return stage.name
    raise UserError(f"{folder.path}: no finished stage to evaluate; train first, or give --checkpoint")


def only_test(spec: DataSpec) -> DataSpec:
    """The data with one training image: evaluation needs none, and decoding them all takes most of the time."""
    return dataclasses.replace(spec, num_train=1, validation_fraction=0.0)


def evaluated_choice(stage: Stage, network: Any, folder: RunFolder) -> tuple[int, ...] | None:
    """Branches a stage's network is evaluated with: the winner, or the middle ones of a supernet; None without."""
    if getattr(network, "branches", 1) == 1:
        return None
    if stage.choice is None or not stage.trains_winner:
        return (network.branches // 2,) * len(network.branch_patterns)
    path = run_files.vector(len(network.branch_patterns), network.branches)
    return tuple(folder.winner(stage.choice, path)["path"])


def make_evaluator(
    experiment: Experiment,
    folder: RunFolder,
    stage: Stage,
    network: Any,
    source: ImageSource,
    devices: Devices,
    *,
    only_test: bool = False,
) -> Evaluator:
    """Evaluates on 'test', where the source has one on 'validation', and a fold's winner on 'others', outside of it."""
    splits = {"test": source.test}
    if source.validation is not None and not only_test:
        splits["validation"] = source.validation
    if stage.choice is not None and stage.trains_winner and not only_test:
        name, fold = parse_choice(stage.choice)
        search = experiment.find(name)
        splits["others"] = searched_split(search, source).take(folds_of(search, source).others(fold))
    return Evaluator(
        network,
        prepare=functools.partial(prepare_eval, mean=source.mean, std=source.std),
        splits=splits,
        batch_size=experiment.config["train"]["eval_batch_size"],
        devices=devices,
        workers=experiment.config["data"]["workers"],
        choice=evaluated_choice(stage, network, folder),
        seeds=seeds_of(experiment, stage),
    )
