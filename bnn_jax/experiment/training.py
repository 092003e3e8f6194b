"""Training the stages of an experiment one after another.

A finished stage is skipped, an interrupted one goes on at its step, a new one starts from what it refers to. Of several
processes the first one decides which of these it is, and writes; see ``hosts``.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from bnn_jax import data, hosts
from bnn_jax.data.memory import ImageSource, Normalization, check_memory
from bnn_jax.errors import Interrupted, UserError
from bnn_jax.experiment import folder as files
from bnn_jax.experiment.build import Experiment, set_up
from bnn_jax.experiment.check import check
from bnn_jax.experiment.evaluation import evaluated_choice, make_evaluator
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.experiment.load import SavedVariables, load_images, normalization_of
from bnn_jax.experiment.results import finish, remake
from bnn_jax.experiment.search import search
from bnn_jax.experiment.start import first_state, state_shapes
from bnn_jax.stages import DataSpec, Stage, fingerprint
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training.devices import all_devices
from bnn_jax.training.interrupt import StopRequest
from bnn_jax.training.loop import LoopOptions, StageLoop
from bnn_jax.training.progress import say
from bnn_jax.training.writers import open_writer


def train(
    experiment: Experiment,
    folder: RunFolder,
    *,
    from_stage: str | None = None,
    fresh: bool = False,
    group: hosts.Group | None = None,
) -> list[dict[str, Any]]:
    """Trains what is left of an experiment.

    Args:
      experiment: the experiment.
      folder: its run folder.
      from_stage: name of a stage to train again, with all after it; their old folders are moved aside.
      fresh: whether an existing run folder is moved aside first.
      group: ends the process if it is asked to stop while it compiles, see ``StopRequest``.

    Returns:
      The results of all stages.

    Raises:
      UserError: the run cannot start, or a stage stopped.
      Interrupted: the run was asked to stop; it is saved.
    """
    check(experiment)
    seeds, stages = experiment.config["num_seeds"], experiment.stages
    if seeds > 1 and jax.default_backend() == "cpu":
        say(f"config.num_seeds={seeds}: this is for accelerators; a CPU trains one after another much faster")
    again = () if from_stage is None else stages[stages.index(experiment.find(from_stage)) :]
    if group is not None:
        group.goes_on_from = folder.last_saved
    with contextlib.ExitStack() as held:
        hosts.from_first("folder", lambda: _prepare(folder, experiment, again, held, fresh=fresh))
        files.check_shared(folder.path)
        stop = held.enter_context(StopRequest(group))
        # Most stages of a chain have the same images, which are then decoded once.
        images = functools.lru_cache(maxsize=1)(functools.partial(_load_images, experiment.config))
        return [
            _finished(experiment, folder, stage) or _run_stage(experiment, folder, stage, images=images, stop=stop)
            for stage in stages
        ]


def _load_images(config: Mapping[str, Any], spec: DataSpec, normalization: Normalization | None) -> ImageSource:
    source = load_images(config, spec, normalization)
    for line in source.notes:
        say(line)
    return source


def _prepare(
    folder: RunFolder, experiment: Experiment, again: tuple[Stage, ...], held: contextlib.ExitStack, *, fresh: bool
) -> None:
    """Makes the folder this run's and locks it until ``held`` is left."""
    if fresh and folder.path.exists():
        with files.locked(folder.path):
            _move_aside(folder.path)
    held.enter_context(files.locked(folder.path))
    files.claim(folder.path, experiment.config, experiment.stages)
    for stage in experiment.stages:
        # A damaged one shows now, and not when all stages before it are trained.
        if stage not in again:
            folder.result(stage.name)
    for stage in again:
        _move_aside(folder.stage(stage.name))


def _move_aside(path: Path) -> None:
    moved = files.move_aside(path)
    if moved:
        say(f"moved {path} to {moved}")


def _finished(experiment: Experiment, folder: RunFolder, stage: Stage) -> dict[str, Any] | None:
    """The result of a stage that was finished before, else None."""

    def read() -> dict[str, Any] | None:
        result = folder.result(stage.name)
        if result is None:
            return None
        if result["stage_fingerprint"] != fingerprint(stage, experiment.stages):
            where = folder.stage(stage.name)
            raise UserError(f"{where} holds a result of another config; --stage={stage.name} trains it again")
        if stage.kind == "train":
            remake(experiment, folder, stage, result)
        accuracy = f", last top-1 {result['last_top1']:.2f} %" if stage.kind == "train" else ""
        say(f"stage {stage.name}: finished before{accuracy}")
        return result

    return hosts.from_first("finished", read)


def _run_stage(
    experiment: Experiment,
    folder: RunFolder,
    stage: Stage,
    *,
    images: Callable[[DataSpec, Normalization | None], ImageSource],
    stop: StopRequest,
) -> dict[str, Any]:
    """Trains or searches, and writes ``result.json``; after that the other processes may read the stage.

    Raises:
      Interrupted: asked to stop before the stage, inside of it, or after it with stages left.
    """
    if stop.agreed(at_once=True):
        raise Interrupted(f"stopped before stage {stage.name}; the same command goes on from there", stop.signal_number)
    started, source = time.monotonic(), images(stage.data, normalization_of(experiment, folder, stage))
    run = search if stage.kind == "search" else _train_stage
    result = run(experiment, folder, stage, source, stop)
    result["process_seconds"] = round(time.monotonic() - started, 1)
    hosts.from_first("result written", lambda: files.write_json(folder.stage(stage.name) / files.RESULT, result))
    if stop.agreed(at_once=True) and stage is not experiment.stages[-1]:
        raise Interrupted(f"stage {stage.name} is finished; the same command goes on with the rest", stop.signal_number)
    return result


def _train_stage(
    experiment: Experiment, folder: RunFolder, stage: Stage, source: ImageSource, stop: StopRequest
) -> dict[str, Any]:
    """Trains what is left of a stage and returns the content of ``result.json``."""
    hosts.same_everywhere(f"data of stage {stage.name}", {"fingerprint": source.fingerprint})
    _check_batch(stage, source)
    setup, saved, devices = set_up(experiment, stage, source), SavedVariables(experiment, folder), all_devices()
    train_config, workers = experiment.config["train"], experiment.config["data"]["workers"]
    # Only now: a run whose images cannot be read leaves nothing that a corrected config would have to respect.
    hosts.from_first("stage folder", lambda: _make_folder(experiment, folder, stage, source))
    with (
        CheckpointStore(folder.checkpoints(stage.name)) as store,
        open_writer(experiment.config, folder.stage(stage.name)) as writer,
    ):
        if store.latest_step() is None:
            state, meta = first_state(setup, saved.inherited_by(setup), devices), None
        else:
            state, meta = store.restore(state_shapes(setup, devices))
            state = devices.replicate(state)
            say(f"stage {stage.name}: going on from step {state.steps_done}")
        loop = StageLoop(
            setup,
            teacher=hosts.values_of_first(saved.of_teacher(setup)),
            choice=evaluated_choice(stage, setup.network, folder) if stage.trains_winner else None,
            evaluator=make_evaluator(experiment, folder, stage, setup.network, source, devices),
            store=store,
            metrics_path=folder.metrics(stage.name),
            options=LoopOptions(train_config["steps_per_dispatch"], train_config["checkpoint_seconds"], workers),
            devices=devices,
            writer=writer,
        )
        state = loop.fit(state, stop, meta=meta)
    return hosts.from_first("result", lambda: finish(experiment, folder, setup, state))


def _make_folder(experiment: Experiment, folder: RunFolder, stage: Stage, source: ImageSource) -> None:
    place, known = folder.stage(stage.name), folder.images(stage.name)
    if known is not None and known["fingerprint"] != source.fingerprint:
        raise UserError(
            f"{place} was begun with other pictures than config.data.data_dir has now: put them back, or "
            f"--stage={stage.name} begins it again"
        )
    place.mkdir(exist_ok=True)
    if known is None and stage.data.name == "folder":
        names = data.class_names(stage.data, data_dir=experiment.config["data"]["data_dir"])
        found = {"classes": names, "mean": source.mean, "std": source.std, "fingerprint": source.fingerprint}
        files.write_json(place / files.IMAGES, found)


def _check_batch(stage: Stage, source: ImageSource) -> None:
    """Says that a batch is larger than the training set, which is then trained in one step.

    Raises:
      UserError: the images of a batch take more memory than there is.
    """
    asked, images = stage.optim.batch_size, len(source.train)
    if asked > images:
        say(f"stage {stage.name}: config.train.batch_size={asked}: the {images:,} training images are one batch")
    # Pixels as float32, one of the parts that pass through the network in turn, divided among the processes.
    each = -(-min(asked, images) // (stage.optim.accumulation_steps * hosts.count()))
    check_memory("config.train.batch_size, config.data.image_size", each, source.image_shape, bytes_each=4)
