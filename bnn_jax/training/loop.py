"""The training loop of a stage: epochs, dispatches, evaluation, checkpoints, stopping and going on.

The position in a run is the number of optimiser steps done, nothing else: the order of the images is a function of
(seed, epoch), so a restored state goes on in the middle of an epoch with exactly the batches that were still to come.
"""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.data.memory import ImageSource
from bnn_jax.errors import Interrupted, NonFiniteLossError
from bnn_jax.schedules import Schedule
from bnn_jax.stages import Stage
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import metrics
from bnn_jax.training.devices import Devices
from bnn_jax.training.evaluate import Evaluator
from bnn_jax.training.feed import Dispatch, Feed
from bnn_jax.training.interrupt import Agreement, StopRequest
from bnn_jax.training.progress import Progress, speed_text
from bnn_jax.training.seeds import Seeds
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import Constants, StepParts, compile_end_of_epoch, compile_train_steps

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


@dataclasses.dataclass
class EpochClock:
    """Time and images of the epoch under way; dispatches that compiled are left out of the rate.

    Attributes:
      seconds: training time of the epoch so far, over restarts.
      timed_seconds: time of the dispatches that did not compile.
      timed_images: their images.
      images: all images of this process in this epoch.
    """

    seconds: float = 0.0
    timed_seconds: float = 0.0
    timed_images: int = 0
    images: int = 0

    def add(self, seconds: float, images: int, *, compiled: bool) -> None:
        """Adds a dispatch."""
        self.seconds += seconds
        self.images += images
        if not compiled:
            self.timed_seconds += seconds
            self.timed_images += images

    @property
    def images_per_second(self) -> float:
        """Training throughput."""
        # Seconds alone do not tell: waiting at the end of an epoch adds time without images.
        if self.timed_images > 0:
            return self.timed_images / self.timed_seconds
        return self.images / self.seconds if self.seconds > 0 else 0.0


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
    ):
        stage, source, parts = setup.stage, setup.source, setup.parts
        self.stage, self.schedule, self.source, self.evaluator = stage, setup.schedule, source, evaluator
        self.store, self.metrics_path, self.options, self.devices = store, metrics_path, options, devices
        self.knobs = parts.knobs
        self.seeds = setup.seeds
        self.run_steps = compile_train_steps(parts, devices, seeds=self.seeds)
        self.end_of_epoch = compile_end_of_epoch(parts.objectives, devices, seeds=self.seeds)
        self.feed = Feed(source.train, devices, workers=options.workers)
        images, labels = self.feed.arrays
        branches = None if choice is None else np.asarray(choice, np.int32)
        self.constants = Constants(images, labels, *devices.replicate((teacher, branches)))
        self.steps_per_epoch = steps_per_epoch(stage, len(source.train))
        # Images that are read as they are needed come batch by batch.
        length = 1 if self.feed.streamed else options.steps_per_dispatch
        self.dispatch_length = dispatch_length(self.steps_per_epoch, length)
        self._compiled_lengths: set[int] = set()
        self._last_save = time.monotonic()
        self._save_due = Agreement()
        self._pending: collections.deque = collections.deque()

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
        meta = meta or {}
        step = state.steps_done
        metrics.cut_back(self.metrics_path, step if meta.get("evaluated", True) else step - 1)
        clock = EpochClock(seconds=meta.get("epoch_seconds", 0.0))
        total = self.stage.optim.epochs * self.steps_per_epoch
        with Progress(self.stage.name, total=total, done=step) as progress:
            if not meta.get("evaluated", True):
                state = self._finish_epoch(state, clock, progress, stop)
                clock = EpochClock()
            first_epoch = state.steps_done // self.steps_per_epoch
            for epoch in range(first_epoch, self.stage.optim.epochs):
                state = self._train_epoch(state, epoch, clock, progress, stop)
                state = self._finish_epoch(state, clock, progress, stop)
                clock = EpochClock()
        self.store.wait()
        return state

    def _dispatches(self, epoch: int, offset: int) -> Iterator[Dispatch]:
        """The dispatches of an epoch, from its step ``offset`` on."""
        num_images = len(self.source.train)
        indices, mask = self.seeds.index_plan(
            epoch,
            num_images=num_images,
            batch_size=min(self.stage.optim.batch_size, num_images),
            drop_last=self.stage.optim.drop_last_batch,
        )
        parts = self.stage.optim.accumulation_steps
        plan = self.devices.pad_rows(indices, mask, parts=parts)
        crops = (self.stage.seed, epoch)
        return self.feed.dispatches(*plan, first=offset, length=self.dispatch_length, random_crops=crops)

    def _train_epoch(
        self, state: TrainState, epoch: int, clock: EpochClock, progress: Progress, stop: StopRequest
    ) -> TrainState:
        step = state.steps_done
        sums: dict[str, float] = collections.defaultdict(float)
        previous, seconds = time.monotonic(), 0.0
        dispatches = self._dispatches(epoch, step - epoch * self.steps_per_epoch)
        for dispatch in dispatches:
            if stop.agreed():
                self._save_and_stop(state, clock, stop, evaluated=True)
            compiled = dispatch.steps not in self._compiled_lengths
            self._compiled_lengths.add(dispatch.steps)
            state, dispatch_metrics = self.run_steps(state, self.constants, dispatch.rows, dispatch.mask)
            self._pending.append((step, dispatch_metrics))
            step += dispatch.steps
            self._collect(sums, ahead=0 if compiled or seconds > SLOW_DISPATCH_SECONDS else DISPATCHES_AHEAD)
            now = time.monotonic()
            seconds, previous = now - previous, now
            clock.add(seconds, dispatch.images, compiled=compiled)
            self._show(progress, step, epoch, clock, sums)
            # The end of an epoch is saved after its evaluation, not here.
            at_end = step == (epoch + 1) * self.steps_per_epoch
            due = self._save_due.largest(int(now - self._last_save > self.options.checkpoint_seconds))
            if due and not at_end:
                self._collect(sums, ahead=0)
                self._save(state, clock, evaluated=True, selection=None)
        self._collect(sums, ahead=0)
        clock.add(time.monotonic() - previous, 0, compiled=False)
        return state

    def _collect(self, sums: dict[str, float], *, ahead: int) -> None:
        """Waits until at most ``ahead`` dispatches are under way, and looks at the losses of those that are done."""
        while len(self._pending) > ahead:
            first_step, device_metrics = self._pending.popleft()
            values = jax.device_get(device_metrics)
            finite = np.isfinite(values["loss"])
            if not finite.all():
                self._pending.clear()
                self._refuse_non_finite(first_step + int(np.argwhere(~finite)[0][0]), finite)
            sums["count"] += float(values["count"].sum())
            sums["correct"] += float(values["correct"].sum())
            sums["loss"] += float((values["loss"] * values["count"]).sum())

    def _show(self, progress: Progress, step: int, epoch: int, clock: EpochClock, sums: dict[str, float]) -> None:
        count = max(sums["count"], 1.0)
        means = f"loss {sums['loss'] / count:.3f}  top-1 {100.0 * sums['correct'] / count:.1f} %"
        where = f"epoch {epoch + 1}/{self.stage.optim.epochs}"
        progress.update(step, f"{where}  {speed_text(clock.images_per_second)}  {means}")

    def _refuse_non_finite(self, step: int, finite: np.ndarray | None = None) -> NoReturn:
        self.store.wait()
        records = metrics.read(self.metrics_path)
        last = {key: records[-1][key] for key in ("epoch", "train_loss", "test_top1")} if records else "none yet"
        good = self.store.latest_step()
        where = f"step {good} in {self.store.directory}" if good is not None else "none was saved yet"
        raise NonFiniteLossError(
            f"stage {self.stage.name}: the loss{self.seeds.owner(finite)} is not finite at step {step}; "
            f"last metrics: {last}; last good checkpoint: {where}"
        )

    def _finish_epoch(self, state: TrainState, clock: EpochClock, progress: Progress, stop: StopRequest) -> TrainState:
        """Evaluates, writes the record, closes the epoch and saves."""
        results = {}
        for split in self.evaluator.splits:
            result = self.evaluator(state.variables, split, should_stop=stop.agreed)
            if result is None:
                self._save_and_stop(state, clock, stop, evaluated=False)
            finite = np.isfinite([row["loss"] for row in result.get("seeds", [result])])
            if not finite.all():
                # A step's loss is the one before its update: what the last step broke shows only here.
                self._refuse_non_finite(state.steps_done, finite)
            results[split] = result
        record = self._record(state, clock, results)
        selection = record.get("validation_top1", record["test_top1"])
        # The record is written before the checkpoint: a crash in between repeats the epoch and cuts the record back.
        metrics.append(self.metrics_path, record)
        state = self.end_of_epoch(state)
        self._save(state, EpochClock(), evaluated=True, selection=selection)
        progress.report(
            f"epoch {record['epoch'] + 1}/{self.stage.optim.epochs}  train loss {record['train_loss']:.4f}  "
            f"train top-1 {record['train_top1']:.2f} %  test top-1 {record['test_top1']:.2f} %  "
            f"{speed_text(record['images_per_second'])}"
        )
        return state

    def _record(self, state: TrainState, clock: EpochClock, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        step = state.steps_done
        each = [metrics.epoch_means(sums) for sums in self.seeds.unstack(jax.device_get(state.metric_sums))]
        for split, result in results.items():
            for values, row in zip(each, result.get("seeds", [result]), strict=True):
                values.update({f"{split}_{name}": row[name] for name in ("top1", "top5", "loss")})
        return {
            "epoch": step // self.steps_per_epoch - 1,
            "step": step,
            "learning_rate": float(self.schedule(jnp.int32(step - 1))),
            **{f"knob/{name}": float(knob(jnp.int32(step - 1))) for name, knob in self.knobs.items()},
            **self.seeds.summary(each),
            "seconds": round(clock.seconds, 3),
            "images_per_second": round(clock.images_per_second, 1),
        }

    def _save(self, state: TrainState, clock: EpochClock, *, evaluated: bool, selection: float | None) -> None:
        finite = np.asarray(self.seeds.over(_all_finite)(state.variables))
        if not finite.all():
            # As above; no broken state may take the place of a good one.
            self._refuse_non_finite(state.steps_done, finite)
        self._last_save = time.monotonic()
        meta = {"stage": self.stage.name, "evaluated": evaluated, "epoch_seconds": round(clock.seconds, 3)}
        chosen = None if selection is None else {"selection_top1": selection}
        self.store.save(state, meta=meta, metrics=chosen)

    def _save_and_stop(self, state: TrainState, clock: EpochClock, stop: StopRequest, *, evaluated: bool) -> NoReturn:
        self._pending.clear()
        step = state.steps_done
        broken = np.asarray(state.metric_sums["non_finite_step"])
        if (broken >= 0).any():
            self._refuse_non_finite(int(broken[broken >= 0].min()), broken < 0)
        if self.store.latest_step() != step:
            self._save(state, clock, evaluated=evaluated, selection=None)
        self.store.wait()
        raise Interrupted(
            f"stage {self.stage.name}: stopped and saved at step {step}; the same command goes on from there",
            stop.signal_number,
        )
