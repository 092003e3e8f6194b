import dataclasses
import functools
import json
import math
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.errors import Interrupted, NonFiniteLossError
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.storage.content_hash import Header
from bnn_jax.training import loop as loop_module
from bnn_jax.training import metrics
from bnn_jax.training.devices import all_devices
from bnn_jax.training.feed import Dispatch
from bnn_jax.training.interrupt import StopRequest
from bnn_jax.training.loop import EpochMeter, LoopOptions, StageLoop, dispatch_length, steps_per_epoch
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import compile_end_of_epoch, compile_train_steps
from tests.training import tiny

DATA = tiny.source(num_train=20, num_test=10, num_validation=6)
# 20 images in batches of 8: two full batches and a partial one.
STEPS, EPOCHS = 3, 2
STAGE = tiny.stage(epochs=EPOCHS)
DEVICES = all_devices()
TIMES = ("seconds", "images_per_second")
PARTS = tiny.parts(chosen=STAGE)
EVALUATOR = tiny.evaluator(PARTS.network, {"test": DATA.test, "validation": DATA.validation})


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """All loops here are of one stage and share its programs: compiling is what takes the time."""
    run_steps, end = compile_train_steps(PARTS, DEVICES), compile_end_of_epoch(PARTS.objectives, DEVICES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "compile_train_steps", lambda *_, **__: run_steps)
        patch.setattr(loop_module, "compile_end_of_epoch", lambda *_, **__: end)
        yield


@functools.cache
def state_shapes() -> TrainState:
    return jax.eval_shape(lambda: tiny.state(PARTS))


class StopAfter(StopRequest):
    """A signal that comes when the loop looks for the n-th time."""

    def __init__(self, looks: float):
        super().__init__()
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        if self.looks < 0:
            self.signal_number = signal.SIGTERM
        return self.looks < 0


class Run:
    """A run folder with one tiny stage; ``fit`` is what a process does."""

    def __init__(self, folder: Path, **options: Any):
        self.folder, self.metrics_path = folder, folder / "metrics.jsonl"
        self.options = LoopOptions(**{"checkpoint_seconds": 1000.0, **options})

    def fit(self, *, looks: float = math.inf, first_state: TrainState | None = None) -> TrainState:
        state, meta = first_state or tiny.state(PARTS), None
        with CheckpointStore(self.folder / "checkpoints") as store:
            if store.latest_step() is not None:
                state, meta = store.restore(state_shapes())
                state = DEVICES.replicate(state)
            return self.make_loop(store).fit(state, StopAfter(looks), meta=meta)

    def make_loop(self, store: CheckpointStore) -> StageLoop:
        return StageLoop(
            tiny.setup(STAGE, PARTS, DATA),
            teacher={},
            evaluator=EVALUATOR,
            store=store,
            metrics_path=self.metrics_path,
            options=self.options,
            devices=DEVICES,
        )

    def records(self) -> list[dict[str, Any]]:
        """The record without what takes another time in every run."""
        return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.read(self.metrics_path)]

    def saved_steps(self) -> list[int]:
        return CheckpointStore(self.folder / "checkpoints", read_only=True).steps()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Run, TrainState]:
    """A run that nothing interrupted, and its final state."""
    run = Run(tmp_path_factory.mktemp("whole"))
    return run, jax.device_get(run.fit())


# ---- parts


@pytest.mark.parametrize(
    ("images", "batch", "drop", "expected"),
    [(20, 8, False, 3), (20, 8, True, 2), (16, 8, False, 2), (5, 8, False, 1), (5, 8, True, 1)],
)
def test_steps_per_epoch(images, batch, drop, expected):
    assert steps_per_epoch(tiny.stage(batch_size=batch, drop_last_batch=drop), images) == expected


@pytest.mark.parametrize(
    ("steps", "requested", "expected"), [(391, 0, 1), (391, 1, 1), (391, 50, 50), (3, 50, 3), (3, 3, 3)]
)
def test_on_cpu_a_dispatch_is_one_step_unless_asked_otherwise(steps, requested, expected):
    assert dispatch_length(steps, requested) == expected


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (100, 100), (101, 51), (391, 98), (10_000, 100)])
def test_on_an_accelerator_an_epoch_is_split_into_near_equal_dispatches(monkeypatch, steps, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch_length(steps, 0) == expected
    assert expected <= loop_module.MOST_STEPS_PER_DISPATCH


def meter_of(monkeypatch, *dispatches: tuple[float, int, bool], before: float = 0.0) -> EpochMeter:
    """The meter of an epoch with dispatches of (seconds, images, whether it was compiled for)."""
    now = [0.0]
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: now[0])
    meter = EpochMeter(lambda *_: pytest.fail("all losses are finite"), before)
    for seconds, images, compiled in dispatches:
        now[0] += seconds
        step_metrics = {"loss": np.full(1, 2.0), "count": np.full(1, images), "correct": np.full(1, images // 2)}
        meter.add(0, Dispatch(None, None, steps=1, images=images), step_metrics, compiled=compiled)
    now[0] += 0.001
    meter.wait()
    return meter


def test_dispatches_that_compile_are_left_out_of_the_rate(monkeypatch):
    meter = meter_of(monkeypatch, (30.0, 8, True), (1.0, 8, False), (1.0, 4, False), before=2.0)
    assert meter.images_per_second == pytest.approx(6.0, rel=1e-3)
    assert meter.seconds == pytest.approx(34.001)
    assert meter.status == "6.0 img/s  loss 2.000  top-1 50.0 %"


def test_an_epoch_that_only_compiled_gives_its_own_rate(monkeypatch):
    assert meter_of(monkeypatch, (4.0, 8, True)).images_per_second == pytest.approx(2.0, rel=1e-3)


def test_an_epoch_without_steps_has_the_rate_0(monkeypatch):
    assert meter_of(monkeypatch).images_per_second == 0.0


# ---- a whole stage


def test_a_stage_writes_a_record_per_epoch(whole):
    run, _ = whole
    records = metrics.read(run.metrics_path)
    assert [(record["epoch"], record["step"]) for record in records] == [(0, 3), (1, 6)]
    names = {"epoch", "step", "learning_rate", "train_loss", "train_top1", "loss/cross_entropy", *TIMES}
    held_out = {f"{split}_{name}" for split in ("test", "validation") for name in ("loss", "top1", "top5")}
    assert all(set(record) == names | held_out for record in records)
    np.testing.assert_allclose([record["learning_rate"] for record in records], [0.1, 0.01], rtol=1e-6)
    assert records[0]["train_loss"] > records[1]["train_loss"] > 0
    assert all(record["images_per_second"] > 0 for record in records)


def test_a_stage_keeps_its_last_and_its_best_epoch(whole):
    run, _ = whole
    assert run.saved_steps() == [3, 6]
    with CheckpointStore(run.folder / "checkpoints", read_only=True) as store:
        records = run.records()
        assert Header.read(store.directory / "3").metrics == {"selection_top1": records[0]["validation_top1"]}
        assert Header.read(store.directory / "6").metrics == {"selection_top1": records[1]["validation_top1"]}


def test_the_last_checkpoint_is_the_final_state(whole):
    run, final = whole
    with CheckpointStore(run.folder / "checkpoints", read_only=True) as store:
        state, meta = store.restore(state_shapes())
    tiny.assert_equal(state, final)
    assert meta == {"stage": "tiny", "evaluated": True, "epoch_seconds": 0.0}


def test_a_finished_stage_that_is_run_again_trains_nothing(whole):
    run, final = whole
    before = run.metrics_path.read_bytes()
    tiny.assert_equal(jax.device_get(run.fit()), final)
    assert run.metrics_path.read_bytes() == before


def test_several_steps_per_dispatch_give_the_same_run(tmp_path, whole):
    run = Run(tmp_path, steps_per_dispatch=2)
    final = run.fit()
    # Programs of one and of two steps are fused differently: rounding of float32 over six steps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), final.params, whole[1].params)
    assert [record["step"] for record in run.records()] == [3, 6]


def test_dispatches_are_aligned_to_the_start_of_the_epoch(tmp_path):
    run = Run(tmp_path, steps_per_dispatch=2)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        loop = run.make_loop(store)
    lengths = {offset: [dispatch.steps for dispatch in loop._dispatches(0, offset)] for offset in range(STEPS)}
    assert lengths == {0: [2, 1], 1: [1, 1], 2: [1]}
    whole_epoch, rest = (np.concatenate([d.rows for d in loop._dispatches(1, offset)]) for offset in (0, 1))
    np.testing.assert_array_equal(rest, whole_epoch[1:])


@pytest.mark.parametrize(("slow_seconds", "ahead"), [(-1.0, [0, 0, 0, 0, 0, 0]), (1000.0, [0, 0, 1, 0, 1, 2])])
def test_no_step_is_under_way_before_a_slow_one_so_that_a_stop_comes_soon(tmp_path, monkeypatch, slow_seconds, ahead):
    monkeypatch.setattr(loop_module, "SLOW_DISPATCH_SECONDS", slow_seconds)
    run, found = Run(tmp_path), []
    with CheckpointStore(tmp_path / "checkpoints") as store:
        add = EpochMeter.add

        def counting(self: EpochMeter, *args: Any, **options: Any) -> None:
            found.append(len(self._pending))
            add(self, *args, **options)

        monkeypatch.setattr(EpochMeter, "add", counting)
        run.make_loop(store).fit(tiny.state(PARTS), StopAfter(math.inf))
    # The first dispatch compiles and is waited for; each of the two epochs begins with none.
    assert found == ahead


# ---- stopping and going on. The loop looks for a signal before each of the 3 steps and of the 2 + 2 batches of test
# and validation, so an epoch has 7 looks.

BEFORE_THE_FIRST_STEP, IN_THE_EPOCH, BEFORE_THE_TEST, IN_THE_VALIDATION = 0, 2, 3, 6
IN_THE_SECOND_EPOCH, AT_THE_LAST_LOOK = 8, 13


@pytest.mark.parametrize(
    "looks",
    [
        BEFORE_THE_FIRST_STEP,
        IN_THE_EPOCH,
        BEFORE_THE_TEST,
        IN_THE_VALIDATION,
        IN_THE_SECOND_EPOCH,
        AT_THE_LAST_LOOK,
    ],
)
def test_a_stage_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, whole, looks):
    run = Run(tmp_path)
    with pytest.raises(Interrupted, match=r"stopped and saved at step \d; the same command goes on") as stopped:
        run.fit(looks=looks)
    assert stopped.value.signal_number == signal.SIGTERM
    tiny.assert_equal(jax.device_get(run.fit()), whole[1])
    assert run.records() == whole[0].records()


def test_a_stage_stopped_again_and_again_goes_on_to_the_same_bits(tmp_path, whole):
    run, final, stops = Run(tmp_path), None, 0
    while final is None:
        try:
            # An evaluation of four batches starts from its beginning: with fewer looks it would never end.
            final = run.fit(looks=5)
        except Interrupted:
            stops += 1
    assert stops >= EPOCHS
    tiny.assert_equal(jax.device_get(final), whole[1])
    assert run.records() == whole[0].records()


def test_saving_after_every_dispatch_changes_nothing(tmp_path, whole):
    run = Run(tmp_path, checkpoint_seconds=0.0)
    tiny.assert_equal(jax.device_get(run.fit()), whole[1])
    assert run.records() == whole[0].records()
    assert set(run.saved_steps()) >= {5, 6}


class Crash(Exception):
    """The process dies here."""


def test_a_crash_before_the_record_of_an_epoch_repeats_the_rest_of_it(tmp_path, whole, monkeypatch):
    def dies(*_: Any) -> None:
        raise Crash

    run = Run(tmp_path, checkpoint_seconds=0.0)
    monkeypatch.setattr(metrics, "append", dies)
    with pytest.raises(Crash):
        run.fit()
    monkeypatch.undo()
    tiny.assert_equal(jax.device_get(run.fit()), whole[1])
    assert run.records() == whole[0].records()


def crash_at_the_last_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of the last epoch is written when the process dies, its checkpoint is not."""
    save = StageLoop._save

    def dies(self: StageLoop, state: TrainState, *args: Any, **options: Any) -> None:
        if int(state.step) == EPOCHS * STEPS:
            raise Crash
        save(self, state, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "_save", dies)
        with pytest.raises(Crash):
            run.fit()
    assert len(run.records()) == EPOCHS


def test_a_crash_between_the_record_of_an_epoch_and_its_checkpoint_leaves_one_record(tmp_path, whole, monkeypatch):
    run = Run(tmp_path)
    crash_at_the_last_checkpoint(run, monkeypatch)
    tiny.assert_equal(jax.device_get(run.fit()), whole[1])
    assert run.records() == whole[0].records()


def test_such_a_crash_after_a_stop_during_the_evaluation_leaves_one_record_too(tmp_path, whole, monkeypatch):
    # The checkpoint that is left has the step of the record, but stands before the evaluation.
    run = Run(tmp_path)
    with pytest.raises(Interrupted):
        run.fit(looks=AT_THE_LAST_LOOK)
    crash_at_the_last_checkpoint(run, monkeypatch)
    tiny.assert_equal(jax.device_get(run.fit()), whole[1])
    assert run.records() == whole[0].records()


# ---- losses that are not finite


def broken(state: TrainState) -> TrainState:
    return state.replace(params=jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), state.params))


def test_a_loss_that_is_not_finite_stops_the_stage_before_anything_is_saved(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"step 0; last metrics: none yet; .*: none was saved yet"):
        run.fit(first_state=broken(tiny.state(PARTS)))
    assert run.saved_steps() == []


def test_the_message_names_the_step_the_last_metrics_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run_epoch = StageLoop.run_epoch
    monkeypatch.setattr(StageLoop, "run_epoch", lambda self, *args: broken(run_epoch(self, *args)))
    with pytest.raises(NonFiniteLossError) as error:
        run.fit()
    (record,) = run.records()
    message = str(error.value)
    assert "stage tiny: the loss is not finite at step 3; last metrics: {'epoch': 0, " in message
    assert f"'train_loss': {record['train_loss']}, " in message
    assert f"'test_top1': {record['test_top1']}" in message
    assert f"last good checkpoint: step 3 in {tmp_path / 'checkpoints'}" in message


def test_a_stop_never_saves_a_state_whose_loss_was_not_finite(tmp_path):
    run = Run(tmp_path)
    # The signal comes while the broken step is still under way.
    state = tiny.state(PARTS)
    state = state.replace(metric_sums={**state.metric_sums, "non_finite_step": jnp.int32(0)})
    with pytest.raises(NonFiniteLossError, match="step 0"):
        run.fit(looks=0, first_state=state)
    assert run.saved_steps() == []


def break_the_last_step_of_an_epoch(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """The loss of a step is the one before its update, so it stays finite here."""
    evaluate = StageLoop._evaluate

    def break_and_evaluate(self: StageLoop, state: TrainState, *args: Any) -> Any:
        values = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), getattr(state, field))
        return evaluate(self, state.replace(**{field: values}), *args)

    monkeypatch.setattr(StageLoop, "_evaluate", break_and_evaluate)


@pytest.mark.parametrize("field", ["params", "batch_stats"])
def test_a_last_step_that_breaks_the_network_stops_the_stage(tmp_path, monkeypatch, field):
    run = Run(tmp_path)
    break_the_last_step_of_an_epoch(monkeypatch, field)
    with pytest.raises(NonFiniteLossError, match="not finite at step 3; last metrics: none yet"):
        run.fit()
    assert run.saved_steps() == []
    assert run.records() == []


def test_a_stop_during_the_evaluation_never_saves_a_broken_network(tmp_path, monkeypatch):
    run = Run(tmp_path)
    break_the_last_step_of_an_epoch(monkeypatch, "params")
    with pytest.raises(NonFiniteLossError, match="not finite at step 3"):
        run.fit(looks=STEPS + 1)
    assert run.saved_steps() == []


def test_every_line_of_the_record_is_json(whole):
    for line in whole[0].metrics_path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_options_say_how_a_stage_is_run_only():
    names = {field.name for field in dataclasses.fields(LoopOptions)}
    assert names == {"steps_per_dispatch", "checkpoint_seconds", "workers"}
