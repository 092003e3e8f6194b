"""Results and pictures of the finished stages."""

import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import data
from bnn_jax.data.augment import prepare_eval
from bnn_jax.data.memory import Split
from bnn_jax.data.stream import StreamedSplit
from bnn_jax.errors import UserError
from bnn_jax.experiment import folder as files
from bnn_jax.experiment import start
from bnn_jax.experiment.build import Experiment, build_objectives, described_network, seeds_of
from bnn_jax.experiment.evaluation import evaluated_choice, only_test
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import SavedVariables, load_images, normalization_of
from bnn_jax.quantizers import build_weight
from bnn_jax.report import classes, flips, pictures, plots
from bnn_jax.stages import Stage
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import metrics
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import outputs_of
from bnn_jax.training.progress import say


def report(experiment: Experiment, folder: RunFolder) -> dict[str, Any]:
    """Results of the finished stages, and pictures, saved in the run folder.

    ``chain.png`` shows the test accuracies of all stages, ``accuracies.png`` those of training and top-5 beside them.
    ``flip_rates.png`` is of the last stage that recorded some. Further ones are those the objectives and quantizers
    offer, each of the last finished stage that offers it: ``label_bank.png``, ``features.png``, ``pattern_use.png``,
    ``pattern_motion.png``. Of the last stage the test images are looked at once more: ``confusion.png``,
    ``mistakes.png`` with those that the network is surest of, and in ``classes.csv`` and ``confusion.csv`` numbers.
    What one of these cannot be drawn from (the data set is not at hand) is said on stderr, and the report goes on
    without it.

    Returns:
      ``stages``, the results; ``picture``, the path of the chain's; ``pictures``, the paths of all; ``numbers``, those
      of the tables, ``classes``, a row for each, and ``classified_by``, the stage, where the data set is at hand.

    Raises:
      UserError: no stage is finished.
    """
    files.check_owner(folder.path, experiment.config, experiment.stages)
    finished = [(stage, result) for stage in experiment.stages if (result := folder.result(stage.name)) is not None]
    if not finished:
        raise UserError(f"{folder.path}: no finished stage to report; train first")
    trained = [stage for stage, _ in finished if stage.kind == "train"]
    records = {
        stage.name: metrics.read(folder.metrics(stage.name), epochs=result["epochs"])
        for stage, result in finished
        if stage.kind == "train"
    }
    chain, accuracies = folder.path / "chain.png", folder.path / "accuracies.png"
    plots.plot_chain([result for stage, result in finished if stage in trained], records, chain)
    plots.plot_accuracies(records, accuracies)
    count, seed = experiment.config["num_seeds"], experiment.config["seed"]
    if count > 1:
        say(f"the chain shows means over {count} seeds, other pictures the first seed, {seed}")
    drawn = [chain, accuracies, *_draw_flip_rates(folder, records), *_draw_offered(experiment, folder, trained)]
    numbers: dict[str, Any] = {}
    try:
        pictures_of_classes, numbers = _report_classes(experiment, folder, trained[-1])
        drawn += pictures_of_classes
    except UserError as error:
        say(f"no confusion.png of stage {trained[-1].name}: {error}")
    stages = [result for _, result in finished]
    return {"stages": stages, "picture": str(chain), "pictures": [str(path) for path in drawn], **numbers}


def _report_classes(experiment: Experiment, folder: RunFolder, stage: Stage) -> tuple[list[Path], dict[str, Any]]:
    """Writes what a stage's network says of the test images; returns the pictures, and the numbers for the report."""
    names = data.class_names(stage.data, data_dir=experiment.config["data"]["data_dir"])
    network, variables = _saved(experiment, folder, stage)
    logits, test = _outputs(experiment, folder, stage, network, variables, part="logits")
    results, mistakes = classes.class_results(logits, test.labels, names), classes.surest_mistakes(logits, test.labels)
    if isinstance(test, Split) or not len(mistakes.images):
        images = test.images[mistakes.images] if isinstance(test, Split) else np.zeros((0, *test.image_shape), np.uint8)
    else:
        images = next(test.batches(mistakes.images[None]))[0]
    drawn = [folder.path / "confusion.png", folder.path / "mistakes.png"]
    title = f"stage {stage.name} after the last epoch, {len(test):,} test images"
    classes.plot_confusion(results, drawn[0], title=title)
    surest = f"the {len(images)} mistakes that it is surest of"
    classes.plot_mistakes(mistakes, images, names, drawn[1], title=f"{title}\n{surest}")
    paths = [str(path) for path in classes.write_numbers(results, folder.path)]
    return drawn, {"numbers": paths, "classes": results.rows, "classified_by": stage.name}


def _saved(experiment: Experiment, folder: RunFolder, stage: Stage) -> tuple[Any, dict[str, Any]]:
    """A stage's network and its variables after the last epoch, of several seeds those of the first."""
    (network, shapes), seeds = described_network(experiment, stage), seeds_of(experiment, stage)
    variables = SavedVariables(experiment, folder).load(f"stage:{stage.name}", shapes, seeds)
    return network, seeds.unstack(variables)[0]


def _outputs(
    experiment: Experiment,
    folder: RunFolder,
    stage: Stage,
    network: Any,
    variables: dict[str, Any],
    *,
    part: Literal["logits", "features"],
    most: int | None = None,
) -> tuple[np.ndarray, Split | StreamedSplit]:
    """What a network gives for the test images, all or the first ones, and these images."""
    config = experiment.config
    source = load_images(config, only_test(stage.data), normalization_of(experiment, folder, stage))
    test = source.test if most is None else source.test.take(np.arange(min(most, len(source.test))))
    found = outputs_of(
        network,
        variables,
        test,
        part=part,
        prepare=functools.partial(prepare_eval, mean=source.mean, std=source.std),
        batch_size=config["train"]["eval_batch_size"],
        devices=all_devices(),
        workers=config["data"]["workers"],
        choice=evaluated_choice(stage, network, folder),
    )
    return found, test


def _draw_flip_rates(folder: RunFolder, records: dict[str, list[dict[str, Any]]]) -> list[Path]:
    recorded = [name for name, rows in records.items() if flips.has_flip_rates(rows)]
    path = folder.path / "flip_rates.png"
    for name in recorded[-1:]:
        flips.plot_flip_rates(records[name], path, title=f"flip rates of stage {name}")
    return [path] if recorded else []


def _draw_offered(experiment: Experiment, folder: RunFolder, trained: list[Stage]) -> list[Path]:
    """Draws the pictures the objectives and weight quantizers offer; returns those that could be drawn."""
    stage_of = {
        name: stage
        for stage in trained
        for name in pictures.offered((*build_objectives(stage), build_weight(stage.quant.weight)(parent=None)))
    }
    drawn = []
    for name, stage in stage_of.items():
        path = folder.path / f"{name}.png"
        try:
            pictures.PICTURES[name](_finished_stage(experiment, folder, stage), path)
        except UserError as error:
            say(f"no {path.name} of stage {stage.name}: {error}")
        else:
            drawn.append(path)
    return drawn


def _finished_stage(experiment: Experiment, folder: RunFolder, stage: Stage) -> pictures.FinishedStage:
    """What pictures of a stage are drawn from, of several seeds the first; images are read where one asks for them."""
    image_shape, num_classes = experiment.describe(stage)
    config, seeds, terms = experiment.config, seeds_of(experiment, stage), build_objectives(stage)
    target = jax.eval_shape(lambda: start.objective_states(terms, num_classes))
    with CheckpointStore(folder.checkpoints(stage.name), read_only=True) as store:
        states = store.restore({"objective_state": seeds.shapes(target)})[0]["objective_state"]

    def features() -> tuple[np.ndarray, np.ndarray]:
        saved = _saved(experiment, folder, stage)
        found, test = _outputs(experiment, folder, stage, *saved, part="features", most=pictures.MOST_IMAGES)
        return found, test.labels

    def variables() -> tuple[dict[str, Any], dict[str, Any]]:
        network, last = _saved(experiment, folder, stage)
        # What is drawn from a seed needs no images; what a stage copies is not what its pictures compare.
        initial = start.init_variables(network, jax.random.key(stage.init_seed), jnp.zeros((1, *image_shape)))
        return initial, last

    names = data.class_names(stage.data, data_dir=config["data"]["data_dir"])
    state = jax.device_get(seeds.unstack(states)[0])
    return pictures.FinishedStage(stage.name, terms, state, features, names, variables)
