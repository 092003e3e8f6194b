"""The training loop of a stage: epochs, dispatches, evaluation, checkpoints, stopping and going on.

The position in a run is the number of optimiser steps done, nothing else: the order of the images is a function of
(seed, epoch), so a restored state goes on in the middle of an epoch with exactly the batches that were still to come.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import run_files
from bnn_jax.data.augment import RANDOM_CROPS
from bnn_jax.data.memory import ImageSource
from bnn_jax.errors import Interrupted, NonFiniteLossError
from bnn_jax.schedules import Schedule
from bnn_jax.stages import Stage
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import flips, metrics
from bnn_jax.training.devices import Devices
from bnn_jax.training.epoch_sums import epoch_means
from bnn_jax.training.evaluate import Evaluator
from bnn_jax.training.feed import Dispatch, Feed
from bnn_jax.training.interrupt import Agreement, StopRequest
from bnn_jax.training.progress import Progress, speed_text
from bnn_jax.training.seeds import Seeds
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, compile_end_of_epoch, compile_train_steps
from bnn_jax.training.writers import Writer

# Dispatches that may be under way at once: enough to hide the host's work. Behind slow ones there is nothing to hide,
# and each that is under way delays a stop.
DISPATCHES_AHEAD = 2
SLOW_DISPATCH_SECONDS = 0.5
MOST_STEPS_PER_DISPATCH = 100


@dataclasses.dataclass(frozen=True)
class Setup:
    """The objects of a stage.

    Attributes:
      stage: the stage.
      source: its images.
      schedule: its learning rate by step.
      network: its network, for all but the training steps.
      parts: what its training step is made of.
      shapes: shapes of the network's variables, of one seed.
      seeds: those it is trained with, side by side.
    """

    stage: Stage
    source: ImageSource
    schedule: Schedule
    network: Any
    parts: StepParts
    shapes: dict[str, Any]
    seeds: Seeds


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How a stage is run; nothing here changes its result.

    Attributes:
      steps_per_dispatch: optimiser steps per call of the compiled program; 0 chooses (1 on CPU).
      checkpoint_seconds: time between checkpoints inside an epoch; every epoch ends with one anyway.
      workers: processes that read images that are not in memory; 0: threads.
    """

    steps_per_dispatch: int = 0
    checkpoint_seconds: float = 300.0
    workers: int = 0


class EpochMeter:
    """Losses, images and time of an epoch under way; waits for dispatches, so that only few are under way at once.

    Dispatches that compiled are left out of the rate.

    Args:
      refuse: called with step and flags where a loss is not finite; does not return.
      seconds: training time of the epoch before, over restarts.
    """

    def __init__(self, refuse: Callable[[int, np.ndarray], NoReturn], seconds: float = 0.0):
        self._refuse, self.seconds, self.images = refuse, seconds, 0
        self._sums: dict[str, float] = collections.defaultdict(float)
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self._timed_seconds, self._timed_images = 0.0, 0
        self._previous, self._last_seconds = time.monotonic(), 0.0

    def add(self, first_step: int, dispatch: Dispatch, step_metrics: Any, *, compiled: bool) -> None:
        """Takes a dispatch that was just started, and waits until few enough are under way.

        Args:
          first_step: optimiser steps done before it.
          dispatch: the dispatch.
          step_metrics: metrics of its steps, on the devices.
          compiled: whether its program was compiled for it.
        """
        self._pending.append((first_step, step_metrics))
        slow = compiled or self._last_seconds > SLOW_DISPATCH_SECONDS
        self._collect(ahead=0 if slow else DISPATCHES_AHEAD)
        self._last_seconds = self._lap()
        self.images += dispatch.images
        if not compiled:
            self._timed_seconds += self._last_seconds
            self._timed_images += dispatch.images

    def wait(self) -> None:
        """Waits for all that is under way."""
        self._collect(ahead=0)
        self._timed_seconds += self._lap()

    def drop(self) -> None:
        """Forgets what is under way."""
        self._pending.clear()

    def _lap(self) -> float:
        now = time.monotonic()
        seconds, self._previous = now - self._previous, now
        self.seconds += seconds
        return seconds

    def _collect(self, *, ahead: int) -> None:
        """Looks at the losses of all dispatches but the last ``ahead``."""
        while len(self._pending) > ahead:
            first_step, device_metrics = self._pending.popleft()
            values = jax.device_get(device_metrics)
            finite = np.isfinite(values["loss"])
            if not finite.all():
                self.drop()
                self._refuse(first_step + int(np.argwhere(~finite)[0][0]), finite)
            self._sums["count"] += float(values["count"].sum())
            self._sums["correct"] += float(values["correct"].sum())
            self._sums["loss"] += float((values["loss"] * values["count"]).sum())

    @property
    def images_per_second(self) -> float:
        """Training throughput."""
        # Seconds alone do not tell: waiting at the end of an epoch adds time without images.
        if self._timed_images > 0:
            return self._timed_images / self._timed_seconds
        return self.images / self.seconds if self.seconds > 0 else 0.0

    @property
    def status(self) -> str:
        """Speed and means of the epoch so far, for people."""
        count = max(self._sums["count"], 1.0)
        loss, top1 = self._sums["loss"] / count, 100.0 * self._sums["correct"] / count
        return f"{speed_text(self.images_per_second)}  loss {loss:.3f}  top-1 {top1:.1f} %"


def steps_per_epoch(stage: Stage, num_images: int) -> int:
    """Optimiser steps of an epoch over ``num_images`` training images."""
    batch_size = min(stage.optim.batch_size, num_images)
    return num_images // batch_size if stage.optim.drop_last_batch else -(-num_images // batch_size)


def dispatch_length(steps: int, requested: int) -> int:
    """Steps per dispatch for epochs of ``steps`` steps: what was asked for, or a near-equal split on an accelerator."""
    if requested > 0:
        return min(requested, steps)
    if jax.default_backend() == "cpu":
        return 1
    return -(-steps // -(-steps // MOST_STEPS_PER_DISPATCH))


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    """Whether no value of a pytree is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class StageLoop:
    """Trains one stage, of one seed or of several at once; the images of all seeds count in images per second.

    Args:
      setup: the stage.
      teacher: the teacher's variables, or {}.
      evaluator: evaluates the network on the held-out splits; must know 'test', may know 'validation'. Of the same
        seeds.
      store: its checkpoints.
      metrics_path: its record.
      options: how it is run.
      devices: placement.
      choice: branches of a supernet that are trained, or None.
      writer: gets every record too.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        teacher: Any,
        evaluator: Evaluator,
        store: CheckpointStore,
        metrics_path: Path,
        options: LoopOptions,
        devices: Devices,
        choice: Sequence[int] | None = None,
        writer: Writer | None = None,
    ):
        self.setup, self.stage, self.seeds, self.writer = setup, setup.stage, setup.seeds, writer or Writer()
        self.evaluator, self.store, self.metrics_path, self.options = evaluator, store, metrics_path, options
        self.run_steps = compile_train_steps(setup.parts, devices, seeds=self.seeds)
        signs, self.records = flips.signs_program(setup.stage, setup.network, setup.source.image_shape), []
        self.end_of_epoch = compile_end_of_epoch(setup.parts.objectives, devices, seeds=self.seeds, signs=signs)
        self.flip_rates = jax.jit(self.seeds.over(functools.partial(flips.flip_rates, signs)))
        self.feed = Feed(setup.source.train, devices, workers=options.workers)
        branches = None if choice is None else np.asarray(choice, np.int32)
        self.constants = Constants(*self.feed.arrays, *devices.replicate((teacher, branches)))
        self.steps_per_epoch = steps_per_epoch(self.stage, len(setup.source.train))
        self.dispatch_length = dispatch_length(self.steps_per_epoch, options.steps_per_dispatch)
        self._compiled_lengths: set[int] = set()
        self._last_save = time.monotonic()
        self._save_due = Agreement()

    def fit(self, state: TrainState, stop: StopRequest, *, meta: dict[str, Any] | None = None) -> TrainState:
        """Trains to the end of the last epoch and returns the final state.

        Args:
          state: a new state, or a restored one.
          stop: looked at between dispatches and between batches of an evaluation.
          meta: what was stored beside the restored state; None for a new one.

        Raises:
          Interrupted: SIGTERM or SIGINT came; the state is saved.
          NonFiniteLossError: the loss was NaN or infinite; the last good checkpoint stays.
        """
        meta, epochs = meta or {"evaluated": True, "epoch_seconds": 0.0}, self.stage.optim.epochs
        # Of an epoch that was stopped in its evaluation all steps are done, but it is not over.
        step = state.steps_done - (0 if meta["evaluated"] else 1)
        shape = run_files.record(self.evaluator.splits, several=self.seeds.count > 1)
        self.records = metrics.cut_back(self.metrics_path, step, epochs=step // self.steps_per_epoch, shape=shape)
        self.writer.start(self.records)
        meter = EpochMeter(self._refuse_non_finite, meta["epoch_seconds"])
        with Progress(self.stage.name, total=epochs * self.steps_per_epoch, done=state.steps_done) as progress:
            for epoch in range(step // self.steps_per_epoch, epochs):
                # Asked here, so that a run that was ended behind its last epoch ends there too.
                if metrics.has_stalled(self.records, patience := self.stage.optim.early_stopping):
                    progress.report(f"ends after epoch {epoch}: no better validation top-1 for {patience} epochs")
                    break
                state = self.run_epoch(state, epoch, meter, progress, stop)
                meter = EpochMeter(self._refuse_non_finite)
        self.store.wait()
        return state

    def run_epoch(
        self, state: TrainState, epoch: int, meter: EpochMeter, progress: Progress, stop: StopRequest
    ) -> TrainState:
        """What is left of an epoch: steps, evaluation, record, checkpoint."""
        step, end = state.steps_done, (epoch + 1) * self.steps_per_epoch
        title = f"epoch {epoch + 1}/{self.stage.optim.epochs}"
        for dispatch in self._dispatches(epoch, self.steps_per_epoch - (end - step)):
            if stop.agreed():
                self._save_and_stop(state, meter, stop, evaluated=True)
            compiled = dispatch.steps not in self._compiled_lengths
            self._compiled_lengths.add(dispatch.steps)
            state, step_metrics = self.run_steps(state, self.constants, dispatch.rows, dispatch.mask)
            meter.add(step, dispatch, step_metrics, compiled=compiled)
            step += dispatch.steps
            progress.update(step, f"{title}  {meter.status}")
            # The end of an epoch is saved after its evaluation, not here.
            if self._is_save_due() and step < end:
                meter.wait()
                self._save(state, seconds=meter.seconds)
        meter.wait()
        record = self._record(state, meter, self._evaluate(state, meter, stop))
        # The record is written before the checkpoint: a crash in between repeats the epoch and cuts the record back.
        metrics.append(self.metrics_path, record)
        self.writer.write(record)
        self.records.append(record)
        state = self.end_of_epoch(state)
        self._save(state, selection=metrics.selection(record))
        progress.report(
            f"{title}  train loss {record['train_loss']:.4f}  train top-1 {record['train_top1']:.2f} %  "
            f"test top-1 {record['test_top1']:.2f} %  {speed_text(record['images_per_second'])}"
        )
        return state

    def _dispatches(self, epoch: int, first: int) -> Iterator[Dispatch]:
        """The dispatches of an epoch, from its step ``first`` on."""
        optim, num_images = self.stage.optim, len(self.setup.source.train)
        batch_size = min(optim.batch_size, num_images)
        plan = self.seeds.index_plan(
            epoch, num_images=num_images, batch_size=batch_size, drop_last=optim.drop_last_batch
        )
        return self.feed.dispatches(
            *plan,
            first=first,
            length=self.dispatch_length,
            parts=optim.accumulation_steps,
            random_crops=(self.stage.seed, epoch) if self.setup.source.augment == RANDOM_CROPS else None,
        )

    def _evaluate(self, state: TrainState, meter: EpochMeter, stop: StopRequest) -> dict[str, dict[str, Any]]:
        """Accuracies and losses by split."""
        results = {}
        for split in self.evaluator.splits:
            result = self.evaluator(state.variables, split, should_stop=stop.agreed)
            if result is None:
                self._save_and_stop(state, meter, stop, evaluated=False)
            finite = np.isfinite([row["loss"] for row in result.get("seeds", [result])])
            if not finite.all():
                # A step's loss is the one before its update: what the last step broke shows only here.
                self._refuse_non_finite(state.steps_done, finite)
            results[split] = result
        return results

    def _record(self, state: TrainState, meter: EpochMeter, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        step, last = state.steps_done, jnp.int32(state.steps_done - 1)
        each = [epoch_means(sums) for sums in self.seeds.unstack(jax.device_get(state.metric_sums))]
        for split, result in results.items():
            for values, row in zip(each, result.get("seeds", [result]), strict=True):
                values.update({f"{split}_{name}": row[name] for name in ("top1", "top5", "loss")})
        for values, rates in zip(each, self.seeds.unstack(jax.device_get(self.flip_rates(state))), strict=True):
            values.update({f"flip_rate/{layer}": float(rate) for layer, rate in rates.items()})
        return {
            "epoch": step // self.steps_per_epoch - 1,
            "step": step,
            "learning_rate": float(self.setup.schedule(last)),
            **{f"knob/{name}": float(knob(last)) for name, knob in self.setup.parts.knobs.items()},
            **self.seeds.summary(each),
            "seconds": round(meter.seconds, 3),
            "images_per_second": round(meter.images_per_second, 1),
        }

    def _is_save_due(self) -> bool:
        """Whether it is time for a checkpoint, for all processes alike; all ask after every dispatch."""
        overdue = time.monotonic() - self._last_save > self.options.checkpoint_seconds
        return self._save_due.largest(int(overdue)) > 0

    def _save(
        self, state: TrainState, *, seconds: float = 0.0, evaluated: bool = True, selection: float | None = None
    ) -> None:
        """Saves a state.

        Args:
          state: the state.
          seconds: training time of the epoch under way.
          evaluated: whether nothing is left to do of the steps done.
          selection: what the best epoch is chosen by, at the end of one.
        """
        finite = np.asarray(self.seeds.over(_all_finite)(state.variables))
        if not finite.all():
            # No broken state may take the place of a good one.
            self._refuse_non_finite(state.steps_done, finite)
        self._last_save = time.monotonic()
        meta = {"stage": self.stage.name, "evaluated": evaluated, "epoch_seconds": round(seconds, 3)}
        self.store.save(state, meta=meta, metrics=None if selection is None else {"selection_top1": selection})

    def _save_and_stop(self, state: TrainState, meter: EpochMeter, stop: StopRequest, *, evaluated: bool) -> NoReturn:
        meter.drop()
        step = state.steps_done
        broken = np.asarray(state.metric_sums["non_finite_step"])
        if (broken >= 0).any():
            self._refuse_non_finite(int(broken[broken >= 0].min()), broken < 0)
        if self.store.latest_step() != step:
            self._save(state, seconds=meter.seconds, evaluated=evaluated)
        self.store.wait()
        raise Interrupted(
            f"stage {self.stage.name}: stopped and saved at step {step}; the same command goes on from there",
            stop.signal_number,
        )

    def _refuse_non_finite(self, step: int, finite: np.ndarray) -> NoReturn:
        self.store.wait()
        records = metrics.read(self.metrics_path)
        last = {key: records[-1][key] for key in ("epoch", "train_loss", "test_top1")} if records else "none yet"
        good = self.store.latest_step()
        where = f"step {good} in {self.store.directory}" if good is not None else "none was saved yet"
        raise NonFiniteLossError(
            f"stage {self.stage.name}: the loss{self.seeds.owner(finite)} is not finite at step {step}; "
            f"last metrics: {last}; last good checkpoint: {where}"
        )
