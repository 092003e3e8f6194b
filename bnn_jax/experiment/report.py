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
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment import start
from bnn_jax.experiment.build import (
    Run,
    build_objectives,
)
from bnn_jax.experiment.check import network_of
from bnn_jax.experiment.evaluate import only_test
from bnn_jax.quantizers import build_weight
from bnn_jax.report import pictures, plots
from bnn_jax.stages import Stage
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import metrics, seeds
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import features_of
from bnn_jax.training.progress import say


def report(run: Run) -> dict[str, Any]:
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
    run_folder.check_owner(run.folder, run.config, run.stages)
    results, records = [], {}
    for stage in run.stages:
        result = run_folder.read_result(run.stage_folder(stage))
        if result is not None:
            results.append(result)
        if result is not None and stage.kind == "train":
            records[stage.name] = metrics.read(run.stage_folder(stage) / run_folder.METRICS)
    if not results:
        raise UserError(f"{run.folder}: no finished stage to report; train first")
    chain = run.folder / "chain.png"
    plots.plot_chain([result for result in results if result["stage"] in records], records, chain)
    accuracies = run.folder / "accuracies.png"
    plots.plot_accuracies(records, accuracies)
    if run.num_seeds > 1:
        say(f"the chain shows means over {run.num_seeds} seeds, other pictures the first seed, {run.config['seed']}")
    others = _draw_offered(run, [stage for stage in run.stages if stage.name in records])
    return {"stages": results, "picture": str(chain), "pictures": [str(path) for path in (chain, accuracies, *others)]}


def _draw_offered(run: Run, finished: list[Stage]) -> list[Path]:
    """Draws the pictures the objectives and weight quantizers offer; returns those that could be drawn."""
    stage_of = {
        name: stage
        for stage in finished
        for name in pictures.offered((*build_objectives(stage), build_weight(stage.quant.weight)(parent=None)))
    }
    drawn = []
    for name, stage in stage_of.items():
        path = run.folder / f"{name}.png"
        try:
            pictures.PICTURES[name](_finished_stage(run, stage), path)
        except UserError as error:
            say(f"no {path.name} of stage {stage.name}: {error}")
        else:
            drawn.append(path)
    return drawn


def _finished_stage(run: Run, stage: Stage) -> pictures.FinishedStage:
    """What pictures of a stage are drawn from, of several seeds the first; images are read where one asks for them."""
    image_shape, num_classes = run.describe(stage)
    terms = build_objectives(stage)
    target = jax.eval_shape(lambda: start.objective_states(terms, num_classes))
    with CheckpointStore(run.checkpoints(stage), read_only=True) as store:
        items = {"objective_state": seeds.stack_shapes(target, run.num_seeds)}
        state = run.seeds_of(stage).unstack(store.restore(items)[0]["objective_state"])[0]
    run = run.alone(0)

    def features() -> tuple[np.ndarray, np.ndarray]:
        network, shapes = network_of(run, stage)
        variables = run.load_variables(f"stage:{stage.name}", shapes)
        source = run.load_data(only_test(stage))
        test = source.test.take(np.arange(min(pictures.MOST_IMAGES, len(source.test))))
        found = features_of(
            network,
            variables,
            test,
            prepare=functools.partial(prepare_eval, mean=source.mean, std=source.std),
            batch_size=run.config["train"]["eval_batch_size"],
            devices=all_devices(),
        )
        return found, test.labels

    def variables() -> tuple[dict[str, Any], dict[str, Any]]:
        network, shapes = network_of(run, stage)
        # What is drawn from a seed needs no images; what a stage copies is not what its pictures compare.
        initial = start.init_variables(network, jax.random.key(stage.init_seed), jnp.zeros((1, *image_shape)))
        return initial, run.load_variables(f"stage:{stage.name}", shapes)

    names = data.class_names(stage.data, data_dir=run.config["data"]["data_dir"])
    return pictures.FinishedStage(stage.name, terms, jax.device_get(state), features, names, variables)
