"""A stage of self-distillation that is stopped while its label bank teaches goes on to the same bits."""

import math
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bnn_jax.errors import Interrupted, NonFiniteLossError
from bnn_jax.stages import spec
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import loop as loop_module
from bnn_jax.training import metrics
from bnn_jax.training.devices import all_devices
from bnn_jax.training.interrupt import StopRequest
from bnn_jax.training.loop import LoopOptions, StageLoop
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import StepParts, compile_end_of_epoch, compile_train_steps
from tests.training import tiny, tiny_skd

DATA = tiny.source(num_train=20, num_test=10)
# 20 images in batches of 8: two full batches and a partial one.
STEPS, EPOCHS = 3, 2
STAGE = tiny.stage(epochs=EPOCHS)
DEVICES = all_devices()
TIMES = ("seconds", "images_per_second")
PARTS = tiny_skd.parts(chosen=STAGE, steps_per_epoch=STEPS)
EVALUATOR = tiny.evaluator(PARTS.network, {"test": DATA.test}, batch_size=10)


@pytest.fixture(scope="module")
def shared_programs():
    """Programs of PARTS, compiled once: compiling is what takes the time."""
    run_steps, end = compile_train_steps(PARTS, DEVICES), compile_end_of_epoch(PARTS.objectives, DEVICES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "compile_train_steps", lambda *_, **__: run_steps)
        patch.setattr(loop_module, "compile_end_of_epoch", lambda *_, **__: end)
        yield


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
    """A run folder with one stage of all four terms; its bank teaches from the second epoch on."""

    def __init__(self, folder: Path, parts: StepParts = PARTS, **options: Any):
        self.folder, self.metrics_path, self.parts = folder, folder / "metrics.jsonl", parts
        self.options = LoopOptions(**{"checkpoint_seconds": 1000.0, **options})

    def fit(self, *, looks: float = math.inf, first_state: TrainState | None = None) -> TrainState:
        """What a process does."""
        state, meta = first_state or tiny_skd.state(self.parts), None
        with CheckpointStore(self.folder / "checkpoints") as store:
            if store.latest_step() is not None:
                state, meta = store.restore(jax.eval_shape(lambda: tiny_skd.state(self.parts)))
                state = DEVICES.replicate(state)
            loop = StageLoop(
                tiny.setup(STAGE, self.parts, DATA),
                teacher={},
                evaluator=EVALUATOR,
                store=store,
                metrics_path=self.metrics_path,
                options=self.options,
                devices=DEVICES,
            )
            return loop.fit(state, StopAfter(looks), meta=meta)

    def records(self) -> list[dict[str, Any]]:
        """The record without what takes another time in every run."""
        return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.read(self.metrics_path)]

    def saved_steps(self) -> list[int]:
        return CheckpointStore(self.folder / "checkpoints", read_only=True).steps()

    def saved_bank(self, step: int) -> dict[str, np.ndarray]:
        with CheckpointStore(self.folder / "checkpoints", read_only=True) as store:
            state, _ = store.restore(jax.eval_shape(lambda: tiny_skd.state(self.parts)), which=step)
        return jax.device_get(state.objective_state["label_bank"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_programs) -> tuple[Run, TrainState]:
    """A run that nothing interrupted, and its final state."""
    run = Run(tmp_path_factory.mktemp("whole"))
    return run, jax.device_get(run.fit())


def test_the_record_holds_every_term_and_the_bank_teaches_in_the_second_epoch(whole):
    run, final = whole
    first, second = run.records()
    names = {"loss/cross_entropy", "loss/feature_swap", "loss/label_bank", "loss/cluster"}
    assert names <= set(first) and names <= set(second)
    assert first["loss/label_bank"] == 0 < second["loss/label_bank"]
    terms = sum(o.weight * second[f"loss/{o.name}"] for o in run.parts.objectives)
    # The mean over three steps of a sum in float32.
    assert second["train_loss"] == pytest.approx(terms, rel=1e-5)
    assert final.objective_state["label_bank"]["known"].any()
    assert int(final.objective_state["label_bank"]["epochs"]) == EPOCHS


# The loop looks for a signal before each of the three steps and before the one batch of the evaluation.
IN_THE_SECOND_EPOCH = 5


def test_a_stage_stopped_while_the_bank_teaches_and_collects_goes_on_to_the_same_bits(tmp_path, whole):
    run = Run(tmp_path)
    with pytest.raises(Interrupted, match=r"stopped and saved at step 4; the same command goes on"):
        run.fit(looks=IN_THE_SECOND_EPOCH)
    bank = run.saved_bank(4)
    # The rows of the first epoch teach, those of the second are being collected.
    assert np.abs(bank["bank"]).max() > 0 and bank["known"].any()
    assert 0 < bank["count"].sum() <= 8
    tiny.assert_equal(jax.device_get(run.fit()), whole[1])
    assert run.records() == whole[0].records()


class Crash(Exception):
    """The process dies here."""


def test_a_stage_that_crashed_while_the_bank_taught_goes_on_to_the_same_bits(tmp_path, whole, monkeypatch):
    append, calls = metrics.append, []

    def append_once(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise Crash
        append(*args)

    run = Run(tmp_path, checkpoint_seconds=0.0)
    with monkeypatch.context() as context:
        context.setattr(metrics, "append", append_once)
        with pytest.raises(Crash):
            run.fit()
    assert run.saved_steps()[-1] == 2 * STEPS - 1
    tiny.assert_equal(jax.device_get(run.fit()), whole[1])
    assert run.records() == whole[0].records()


def test_a_class_never_right_ends_the_strict_form_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "compile_train_steps", compile_train_steps)
    monkeypatch.setattr(loop_module, "compile_end_of_epoch", compile_end_of_epoch)
    terms = tiny_skd.build_terms(spec("cross_entropy"), spec("label_bank", strict_release=True))
    run = Run(tmp_path, tiny_skd.parts(chosen=STAGE, steps_per_epoch=STEPS, objectives=terms))
    first = tiny_skd.state(run.parts)
    # A classifier that always answers the last class: the others are never right in the first epoch.
    bias = first.params["fc"]["bias"].at[-1].add(1000.0)
    params = {**first.params, "fc": {**first.params["fc"], "bias": bias}}
    with pytest.raises(NonFiniteLossError, match=r"the loss is not finite at step 3; last metrics: \{'epoch': 0"):
        run.fit(first_state=first.replace(params=params))
    # What the first epoch left is kept.
    assert run.saved_steps() == [STEPS]
    assert np.isnan(run.saved_bank(STEPS)["bank"]).any()
