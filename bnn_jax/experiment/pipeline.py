"""What ``launch.py`` can do: train the stages of a run one after another, evaluate, summarise, report.

A finished stage is skipped, an interrupted one goes on at its step, a new one starts from what it refers to. Of several
processes the first one decides which of these it is, and writes; see ``hosts``.
"""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import data, hosts
from bnn_jax.data.augment import prepare_eval
from bnn_jax.errors import Interrupted, UserError
from bnn_jax.experiment import run_folder, search_stage, start
from bnn_jax.experiment.build import (
    Assembly,
    Run,
    assemble,
    build_objectives,
    check_knobs,
    initial_state,
    load_checkpoint,
    make_evaluator,
    teacher_variables,
)
from bnn_jax.quantizers import build_weight
from bnn_jax.report import complexity, levels, pictures, plots
from bnn_jax.stages import Stage, fingerprint, parse_choice, parse_reference
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.storage.weights import encoded_weights, save_weights
from bnn_jax.training import metrics, seeds
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import features_of
from bnn_jax.training.interrupt import StopRequest
from bnn_jax.training.loop import LoopOptions, StageLoop
from bnn_jax.training.progress import say
from bnn_jax.training.state import TrainState


def train(run: Run, *, from_stage: str | None = None, fresh: bool = False) -> list[dict[str, Any]]:
    """Trains what is left of a run.

    Args:
      run: the run.
      from_stage: name of a stage to train again, with all after it; their old folders are moved aside.
      fresh: whether an existing run folder is moved aside first.

    Returns:
      The results of all stages.

    Raises:
      UserError: the run cannot start, or a stage stopped.
      Interrupted: the run was asked to stop; it is saved.
    """
    check(run)
    if run.num_seeds > 1 and jax.default_backend() == "cpu":
        say(f"config.num_seeds={run.num_seeds}: this is for accelerators; a CPU trains one after another much faster")
    again = () if from_stage is None else run.stages[run.stages.index(run.find(from_stage)) :]
    hosts.on_loss(lambda: _last_saved(run))
    with contextlib.ExitStack() as held:
        hosts.from_first("folder", lambda: _prepare_folder(run, again, held, fresh=fresh))
        run_folder.check_shared(run.folder)
        stop = held.enter_context(StopRequest())
        return [_finished_result(run, stage) or _train_stage(run, stage, stop) for stage in run.stages]


def _prepare_folder(run: Run, again: tuple[Stage, ...], held: contextlib.ExitStack, *, fresh: bool) -> None:
    """Makes the run's folder this run's and locks it until ``held`` is left."""
    if fresh and run.folder.exists():
        with run_folder.locked(run.folder):
            _move_aside(run.folder)
    held.enter_context(run_folder.locked(run.folder))
    run_folder.claim(run.folder, run.config, run.stages)
    for stage in again:
        _move_aside(run.stage_folder(stage))


def _last_saved(run: Run) -> str:
    """Where a run goes on that ends here, as far as can be seen in its folder."""
    for stage in reversed(run.stages):
        if run_folder.read_result(run.stage_folder(stage)) is not None:
            return f"the end of stage {stage.name}"
        steps = [int(path.name) for path in run.checkpoints(stage).glob("*") if path.name.isdecimal()]
        if steps:
            return f"step {max(steps)} of stage {stage.name}"
    return "the start"


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
            run.network(stage, num_classes=data.describe(stage.data)[1], trained=True)
        # Tracing a large network takes seconds, and many stages may share one.
        key = (stage.network, stage.quant, data.describe(stage.data), stage.compute_dtype)
        if key not in built:
            _network_of(run, stage)
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


def _network_of(run: Run, stage: Stage) -> tuple[Any, dict[str, Any]]:
    """The stage's network and the shapes of its variables.

    Raises:
      UserError: it cannot be built, or not for images of this size.
    """
    image_shape, num_classes = data.describe(stage.data)
    network = run.network(stage, num_classes=num_classes)
    try:
        return network, start.variable_shapes(network, image_shape)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        what = f"network {stage.network.name!r} with images of {'x'.join(map(str, image_shape))}"
        # Nothing is left of a feature map after too many strides, and a mean over it divides by zero.
        why = "they are too small" if isinstance(error, ZeroDivisionError) else " ".join(str(error).split())
        raise UserError(f"stage {stage.name}: {what}: {why}") from error


def _move_aside(path: Path) -> None:
    moved = run_folder.move_aside(path)
    if moved:
        say(f"moved {path} to {moved}")


def _finished_result(run: Run, stage: Stage) -> dict[str, Any] | None:
    return hosts.from_first("finished", lambda: _read_result(run, stage))


def _read_result(run: Run, stage: Stage) -> dict[str, Any] | None:
    folder = run.stage_folder(stage)
    result = run_folder.read_result(folder)
    if result is not None:
        if result["stage_fingerprint"] != fingerprint(stage, run.stages):
            raise UserError(f"{folder} holds a result of another config; --stage={stage.name} trains it again")
        accuracy = f", last top-1 {result['last_top1']:.2f} %" if "last_top1" in result else ""
        say(f"stage {stage.name}: finished before{accuracy}")
    return result


def _train_stage(run: Run, stage: Stage, stop: StopRequest) -> dict[str, Any]:
    if stop.agreed(at_once=True):
        raise Interrupted(f"stopped before stage {stage.name}; the same command goes on from there", stop.signal_number)
    started, folder = time.monotonic(), run.stage_folder(stage)
    if stage.kind == "search":
        return _save_result(run, stage, search_stage.search(run, stage, stop), stop, started)
    source = run.load_data(stage)
    hosts.same_everywhere(f"data of stage {stage.name}", {"fingerprint": source.fingerprint})
    assembly = assemble(run, stage, source)
    # Only now: a run whose images cannot be read leaves nothing that a corrected config would have to respect.
    hosts.from_first("stage folder", lambda: folder.mkdir(exist_ok=True))
    with CheckpointStore(folder / run_folder.CHECKPOINTS) as store:
        state = _fit(run, assembly, store, stop)
    result = hosts.from_first("result", lambda: _finish(run, assembly, state, folder))
    return _save_result(run, stage, result, stop, started)


def _save_result(run: Run, stage: Stage, result: dict[str, Any], stop: StopRequest, started: float) -> dict[str, Any]:
    """Writes ``result.json`` of a stage that began at ``started``; after that the other processes may read the stage.

    Raises:
      Interrupted: asked to stop, with stages left.
    """
    result["process_seconds"] = round(time.monotonic() - started, 1)
    path = run.stage_folder(stage) / run_folder.RESULT
    hosts.from_first("result written", lambda: run_folder.write_json(path, result))
    if stop.agreed(at_once=True) and stage is not run.stages[-1]:
        raise Interrupted(f"stage {stage.name} is finished; the same command goes on with the rest", stop.signal_number)
    return result


def _fit(run: Run, assembly: Assembly, store: CheckpointStore, stop: StopRequest) -> TrainState:
    """The state after the last epoch, from a new start or from the last checkpoint."""
    devices, stage = all_devices(), assembly.stage
    if store.latest_step() is None:
        state, meta = initial_state(run, assembly, devices), None
    else:
        state, meta = store.restore(seeds.stack_shapes(assembly.state_shapes(devices), run.num_seeds))
        state = devices.replicate(state)
        say(f"stage {stage.name}: going on from step {state.steps_done}")
    train_config = run.config["train"]
    loop = StageLoop(
        stage,
        assembly.parts,
        schedule=assembly.schedule,
        source=assembly.source,
        teacher=hosts.values_of_first(teacher_variables(run, assembly)),
        evaluator=make_evaluator(run, stage, assembly.network, assembly.source, devices),
        store=store,
        metrics_path=run.stage_folder(stage) / run_folder.METRICS,
        options=LoopOptions(
            steps_per_dispatch=train_config["steps_per_dispatch"],
            checkpoint_seconds=train_config["checkpoint_seconds"],
            workers=run.config["data"]["workers"],
        ),
        devices=devices,
        choice=run.evaluated_choice(stage, assembly.network) if _is_winner(stage) else None,
        seeds=run.seeds_of(stage),
    )
    return loop.fit(state, stop, meta=meta)


def _finish(run: Run, assembly: Assembly, state: TrainState, folder: Path) -> dict[str, Any]:
    """Writes what people and other programs read; returns the content of ``result.json``."""
    group = run.seeds_of(assembly.stage)
    each = dict(zip(group.names, group.unstack(jax.device_get(state.variables)), strict=True))
    result = _result(run, assembly, list(each.values()))
    _save_for_people(assembly, each, folder)
    return result


def _save_for_people(assembly: Assembly, each: dict[int, dict[str, Any]], folder: Path) -> None:
    """The record as a table, and the weights in use after the last epoch of each seed, for other programs to read."""
    records = [seeds.table_row(record) for record in metrics.read(folder / run_folder.METRICS)]
    metrics.write_csv(records, folder / run_folder.METRICS_TABLE)
    for seed, variables in each.items():
        encoded = encoded_weights(assembly.network, variables, assembly.source.image_shape)
        if encoded:
            save_weights(folder / run_folder.weights_file(seed if len(each) > 1 else None), encoded)


def _result(run: Run, assembly: Assembly, each: list[dict[str, Any]]) -> dict[str, Any]:
    """Content of ``result.json``: last epoch first, best beside it with how it was chosen.

    Args:
      run: the run.
      assembly: the stage.
      each: the variables of each seed.
    """
    stage, source = assembly.stage, assembly.source
    records = metrics.read(run.stage_folder(stage) / run_folder.METRICS)
    selection = "validation" if source.validation is not None else "test"
    best = max(records, key=lambda record: (record[f"{selection}_top1"], -record["epoch"]))
    last = records[-1]
    # What is left of a supernet when its winner is known has one branch.
    network = assembly.network.clone(branches=1) if _is_winner(stage) else assembly.network
    costs = complexity.complexity(network, source.image_shape)
    in_use = [levels.levels_in_use(assembly.network, variables, source.image_shape) for variables in each]
    device = jax.devices()[0]
    return {
        "stage": stage.name,
        "bits": stage.bits,
        "last_top1": last["test_top1"],
        "best_top1": best["test_top1"],
        "best_epoch": best["epoch"],
        "selection": selection,
        "last_top5": last["test_top5"],
        "last_loss": last["test_loss"],
        "epochs": len(records),
        "steps": last["step"],
        "seed": run.config["seed"],
        "data": stage.data.name,
        "num_train": len(source.train),
        "num_test": len(source.test),
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "images_per_second": round(sorted(record["images_per_second"] for record in records)[len(records) // 2], 1),
        "quantized_weight_bits": costs.total.quantized_bits,
        "stored_bits": costs.total.stored_bits,
        "level_bits": max((bits for layers in in_use for _, bits in layers.values()), default=None),
        "parameters": costs.total.parameters,
        "data_fingerprint": source.fingerprint,
        "stage_fingerprint": fingerprint(stage, run.stages),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        **(_winner(run, stage, records) if _is_winner(stage) else {}),
        **(_of_seeds(records, best) if run.num_seeds > 1 else {}),
        **run_folder.provenance(),
    }


def _of_seeds(records: list[dict[str, Any]], best: dict[str, Any]) -> dict[str, Any]:
    """What the result of several seeds says besides: standard deviations of its means, and the values of each seed."""
    last = records[-1]
    names = {"last_top1": "test_top1", "last_top5": "test_top5", "last_loss": "test_loss"}
    return {
        "num_seeds": len(last["seeds"]),
        **{f"{name}_sd": last[f"{key}_sd"] for name, key in names.items()},
        "best_top1_sd": best["test_top1_sd"],
        "seeds": [
            {
                "seed": row["seed"],
                "last_top1": row["test_top1"],
                "best_top1": max(record["seeds"][index]["test_top1"] for record in records),
                "last_loss": row["test_loss"],
            }
            for index, row in enumerate(last["seeds"])
        ],
    }


def _is_winner(stage: Stage) -> bool:
    """Whether a stage trains one path of a supernet, that of a search's winner."""
    return stage.choice not in (None, "uniform")


def _winner(run: Run, stage: Stage, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the result of a fine-tuned winner says besides: its path, and its accuracies in and outside of its fold."""
    assert stage.choice is not None
    found = run.fold_result(stage.choice)
    options = run.find(parse_choice(stage.choice)[0]).search.kwargs  # type: ignore[union-attr]
    outside = [record["others_top1"] for record in records]
    best = options["report_epoch"] == "best"
    return {
        **{name: found[name] for name in ("fold", "path", "fold_top1", "full_top1")},
        "folds": options["folds"],
        "search_on": options["search_on"],
        # As released: of the values before fine-tuning and after each of its epochs.
        "tuned_top1": max(found["full_top1"], *outside) if best else outside[-1],
    }


def winners(run: Run) -> dict[str, Any] | None:
    """What came of the folds of a search, as far as they are fine-tuned; None where there is none."""
    results = (run_folder.read_result(run.stage_folder(stage)) for stage in run.stages)
    return search_stage.winners([result for result in results if result is not None])


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
    network, shapes = _network_of(run, stage)
    if checkpoint is not None:
        variables, path = load_checkpoint(checkpoint, seeds.stack_shapes(shapes, run.num_seeds)), checkpoint
    else:
        variables = run.load_variables(f"stage:{stage.name}@{which or 'last'}", shapes)
        path = run.checkpoints(stage)
    devices = all_devices()
    evaluator = make_evaluator(run, stage, network, run.load_data(_only_test(stage)), devices, only_test=True)
    result = evaluator(devices.replicate(variables), "test")
    assert result is not None  # only asked to stop could it be
    return {**result, "stage": stage.name, "checkpoint": str(path)}


def _last_finished(run: Run) -> Stage:
    for stage in reversed(run.stages):
        if stage.kind == "train" and run_folder.read_result(run.stage_folder(stage)) is not None:
            return stage
    raise UserError(f"{run.folder}: no finished stage to evaluate; train first, or give --checkpoint")


def summary(run: Run, *, stage_name: str | None = None) -> complexity.Complexity:
    """Costs of a stage's network, layer by layer; None is the last stage.

    Raises:
      UserError: no such stage, or its network cannot be built.
    """
    stage = run.find(stage_name) if stage_name else run.stages[-1]
    network, _ = _network_of(run, stage)
    if _is_winner(stage):
        network = network.clone(branches=1)
    image_shape, _ = data.describe(stage.data)
    title = f"Stage {stage.name}: {stage.network.name}, images of {'x'.join(map(str, image_shape))}"
    others = [f"--stage={other.name}" for other in run.stages if other is not stage]
    if others:
        title += f"\n(other stages: {', '.join(others)})"
    return dataclasses.replace(complexity.complexity(network, image_shape), title=title)


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
    image_shape, num_classes = data.describe(stage.data)
    terms = build_objectives(stage)
    target = jax.eval_shape(lambda: start.objective_states(terms, num_classes))
    with CheckpointStore(run.checkpoints(stage), read_only=True) as store:
        items = {"objective_state": seeds.stack_shapes(target, run.num_seeds)}
        state = run.seeds_of(stage).unstack(store.restore_items(items)[0]["objective_state"])[0]
    run = run.alone(0)

    def features() -> tuple[np.ndarray, np.ndarray]:
        network, shapes = _network_of(run, stage)
        variables = run.load_variables(f"stage:{stage.name}", shapes)
        source = run.load_data(_only_test(stage))
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
        network, shapes = _network_of(run, stage)
        # What is drawn from a seed needs no images; what a stage copies is not what its pictures compare.
        initial = start.init_variables(network, jax.random.key(stage.init_seed), jnp.zeros((1, *image_shape)))
        return initial, run.load_variables(f"stage:{stage.name}", shapes)

    names = data.class_names(stage.data, data_dir=run.config["data"]["data_dir"])
    return pictures.FinishedStage(stage.name, terms, jax.device_get(state), features, names, variables)


def _only_test(stage: Stage) -> Stage:
    """The stage with one training image: evaluation needs none, and decoding them all takes most of the time."""
    return dataclasses.replace(stage, data=dataclasses.replace(stage.data, num_train=1, validation_fraction=0.0))
