"""Results and pictures of the finished stages."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import data
from bnn_jax.data.augment import prepare_eval
from bnn_jax.errors import UserError
from bnn_jax.experiment import folder as files
from bnn_jax.experiment import start
from bnn_jax.experiment.build import Experiment, build_objectives, described_network, seeds_of
from bnn_jax.experiment.evaluation import only_test
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import SavedVariables, load_images
from bnn_jax.quantizers import build_weight
from bnn_jax.report import pictures, plots
from bnn_jax.stages import Stage
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import metrics
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import features_of
from bnn_jax.training.progress import say


def report(experiment: Experiment, folder: RunFolder) -> dict[str, Any]:
    """Results of the finished stages, and pictures, saved in the run folder.

    ``chain.png`` shows the test accuracies of all stages, ``accuracies.png`` those of training and top-5 beside them.
    Further ones are those the objectives and quantizers offer, each of the last finished stage that offers it:
    ``label_bank.png``, ``features.png``, ``pattern_use.png``, ``pattern_motion.png``. What one of these cannot be drawn
    from (the data set is not at hand) is said on stderr, and the report goes on without it.

    Returns:
      ``stages``, the results; ``picture``, the path of the chain's; ``pictures``, the paths of all.

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
    drawn = [chain, accuracies, *_draw_offered(experiment, folder, trained)]
    stages = [result for _, result in finished]
    return {"stages": stages, "picture": str(chain), "pictures": [str(path) for path in drawn]}


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

    def saved() -> tuple[Any, dict[str, Any]]:
        network, shapes = described_network(experiment, stage)
        variables = SavedVariables(experiment, folder).load(f"stage:{stage.name}", shapes, seeds)
        return network, seeds.unstack(variables)[0]

    def features() -> tuple[np.ndarray, np.ndarray]:
        (network, variables), source = saved(), load_images(config, only_test(stage.data))
        test = source.test.take(np.arange(min(pictures.MOST_IMAGES, len(source.test))))
        found = features_of(
            network,
            variables,
            test,
            prepare=functools.partial(prepare_eval, mean=source.mean, std=source.std),
            batch_size=config["train"]["eval_batch_size"],
            devices=all_devices(),
        )
        return found, test.labels

    def variables() -> tuple[dict[str, Any], dict[str, Any]]:
        network, last = saved()
        # What is drawn from a seed needs no images; what a stage copies is not what its pictures compare.
        initial = start.init_variables(network, jax.random.key(stage.init_seed), jnp.zeros((1, *image_shape)))
        return initial, last

    names = data.class_names(stage.data, data_dir=config["data"]["data_dir"])
    state = jax.device_get(seeds.unstack(states)[0])
    return pictures.FinishedStage(stage.name, terms, state, features, names, variables)
