"""Training the stages of a run one after another.

A finished stage is skipped, an interrupted one goes on at its step, a new one starts from what it refers to. Of several
processes the first one decides which of these it is, and writes; see ``hosts``.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

import jax

from bnn_jax import hosts
from bnn_jax.errors import Interrupted, UserError
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment import search
from bnn_jax.experiment.build import (
    Assembly,
    Run,
    assemble,
    initial_state,
    make_evaluator,
    teacher_variables,
)
from bnn_jax.experiment.check import check
from bnn_jax.experiment.results import finish, is_winner
from bnn_jax.stages import Stage, fingerprint
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import seeds
from bnn_jax.training.devices import all_devices
from bnn_jax.training.interrupt import StopRequest
from bnn_jax.training.loop import LoopOptions, StageLoop
from bnn_jax.training.progress import say
from bnn_jax.training.state import TrainState


def train(
    run: Run, *, from_stage: str | None = None, fresh: bool = False, group: hosts.Group | None = None
) -> list[dict[str, Any]]:
    """Trains what is left of a run.

    Args:
      run: the run.
      from_stage: name of a stage to train again, with all after it; their old folders are moved aside.
      fresh: whether an existing run folder is moved aside first.
      group: ends the process if it is asked to stop while it compiles, see ``StopRequest``.

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
    if group is not None:
        group.goes_on_from = lambda: _last_saved(run)
    with contextlib.ExitStack() as held:
        hosts.from_first("folder", lambda: _prepare_folder(run, again, held, fresh=fresh))
        run_folder.check_shared(run.folder)
        stop = held.enter_context(StopRequest(group))
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
        return _save_result(run, stage, search.search(run, stage, stop), stop, started)
    source = run.load_data(stage)
    hosts.same_everywhere(f"data of stage {stage.name}", {"fingerprint": source.fingerprint})
    assembly = assemble(run, stage, source)
    # Only now: a run whose images cannot be read leaves nothing that a corrected config would have to respect.
    hosts.from_first("stage folder", lambda: folder.mkdir(exist_ok=True))
    with CheckpointStore(folder / run_folder.CHECKPOINTS) as store:
        state = _fit(run, assembly, store, stop)
    result = hosts.from_first("result", lambda: finish(run, assembly, state, folder))
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
        choice=run.evaluated_choice(stage, assembly.network) if is_winner(stage) else None,
        seeds=run.seeds_of(stage),
    )
    return loop.fit(state, stop, meta=meta)
