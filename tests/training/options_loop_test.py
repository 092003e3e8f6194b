"""A whole stage with mixup, an average of the weights, flip rates and event files, killed and gone on with."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.errors import Interrupted
from bnn_jax.experiment import start
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.storage.weights import encoded_weights
from bnn_jax.training import flips, metrics
from bnn_jax.training import loop as loop_module
from bnn_jax.training.devices import all_devices
from bnn_jax.training.loop import LoopOptions, Setup, StageLoop
from bnn_jax.training.seeds import Seeds
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import StepParts, compile_end_of_epoch, compile_train_steps
from bnn_jax.training.writers import open_writer
from tests.training import tiny
from tests.training.loop_test import IN_THE_EPOCH, IN_THE_SECOND_EPOCH, IN_THE_VALIDATION, TIMES, StopAfter
from tests.training.writers_test import written

DATA = tiny.source(num_train=20, num_test=10, num_validation=6)
STEPS, EPOCHS, PATIENCE = 3, 2, 2
DEVICES = all_devices()
SHAPE = (tiny.SIZE, tiny.SIZE, 3)


def set_up(*, epochs: int = EPOCHS, log_flips: bool = True, seeds: Seeds | None = None, **parts: Any) -> Setup:
    stage = tiny.stage(epochs=epochs, ema_decay=parts.get("ema_decay", 0.0), early_stopping=PATIENCE)
    stage = dataclasses.replace(stage, log_flip_rate=log_flips)
    return tiny.setup(stage, tiny.parts(chosen=stage, **parts), DATA, seeds=seeds)


SETUP = set_up(mixup=0.4, ema_decay=0.5)
NETWORK = SETUP.network
SIGNS = flips.signs_program(SETUP.stage, NETWORK, SHAPE)
EVALUATOR = tiny.evaluator(NETWORK, {"test": DATA.test, "validation": DATA.validation})


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of a stage share its programs: compiling is what takes the time."""
    steps: dict[float, Any] = {}
    ends = functools.cache(
        lambda with_signs: compile_end_of_epoch(SETUP.parts.objectives, DEVICES, signs=SIGNS if with_signs else None)
    )

    def compiled_steps(parts: StepParts, *_: Any, **__: Any) -> Any:
        return steps.setdefault(parts.mixup, compile_train_steps(parts, DEVICES))

    with pytest.MonkeyPatch.context() as patch:
        # Any numbers will do here, and those of the Beta distribution take seconds to compile.
        patch.setattr(jax.random, "beta", lambda key, *_: jax.random.uniform(key))
        patch.setattr(loop_module, "compile_train_steps", compiled_steps)
        patch.setattr(loop_module, "compile_end_of_epoch", lambda *_, signs, **__: ends(signs is not None))
        yield


def new_state(setup: Setup) -> TrainState:
    return start.new_state(setup, jax.tree.map(jnp.array, tiny.variables(NETWORK)), DEVICES)


def fit(folder: Path, setup: Setup = SETUP, *, looks: float = math.inf, evaluator: Any = EVALUATOR) -> TrainState:
    """What a process does with a run folder."""
    state, meta = new_state(setup), None
    config = {"name": "tiny", "log": {"tensorboard": True, "wandb": False}}
    with CheckpointStore(folder / "checkpoints") as store, open_writer(config, folder) as writer:
        if store.latest_step() is not None:
            state, meta = store.restore(jax.eval_shape(lambda: new_state(setup)))
            state = DEVICES.replicate(state)
        loop = StageLoop(
            setup,
            teacher={},
            evaluator=evaluator,
            store=store,
            metrics_path=folder / "metrics.jsonl",
            options=LoopOptions(checkpoint_seconds=1000.0),
            devices=DEVICES,
            writer=writer,
        )
        return jax.device_get(loop.fit(state, StopAfter(looks), meta=meta))


def records(folder: Path) -> list[dict[str, Any]]:
    rows = metrics.read(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, TrainState]:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install 'bnn_jax[tensorboard]'")
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder)


@pytest.mark.parametrize("looks", [IN_THE_EPOCH, IN_THE_VALIDATION, IN_THE_SECOND_EPOCH])
def test_a_stage_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, whole, looks):
    with pytest.raises(Interrupted):
        fit(tmp_path, looks=looks)
    tiny.assert_equal(fit(tmp_path), whole[1])
    assert records(tmp_path) == records(whole[0])
    events = [sorted(event for event in written(path) if event[0] not in TIMES) for path in (tmp_path, whole[0])]
    assert events[0] == events[1] and len(events[0]) == EPOCHS * (len(records(tmp_path)[0]) - 1)


def test_the_average_is_what_is_evaluated_and_not_what_is_trained(whole):
    folder, final = whole
    result = EVALUATOR(DEVICES.replicate(final.variables), "test")
    assert records(folder)[-1]["test_loss"] == result["loss"]
    assert (final.params["conv"]["kernel"] != final.moving["params"]["conv"]["kernel"]).any()


def test_a_network_is_read_from_a_checkpoint_as_the_average(whole):
    folder, final = whole
    with CheckpointStore(folder / "checkpoints", read_only=True) as store:
        variables = {name: tree for name, tree in final.variables.items() if name != "knobs"}
        tiny.assert_equal(store.restore(jax.eval_shape(lambda: variables))[0], variables)


def test_flip_rates_compare_an_epoch_with_the_one_before(whole):
    folder, final = whole
    with CheckpointStore(folder / "checkpoints", read_only=True) as store:
        middle = store.restore(jax.eval_shape(lambda: new_state(SETUP)), which=STEPS)[0]
    initial = tiny.variables(NETWORK)
    each = [initial, *({**state.variables, **state.moving} for state in (middle, final))]
    signs = [np.sign(encoded_weights(NETWORK, variables, SHAPE)["conv"].decode()) for variables in each]
    rates = [(old != new).mean() for old, new in itertools.pairwise(signs)]
    assert [record["flip_rate/conv"] for record in records(folder)] == pytest.approx(rates)
    assert max(rates) > 0
    assert not [name for name in records(folder)[0] if name.startswith("flip_rate/fc")]


def test_a_stage_of_several_seeds_keeps_the_shapes_of_its_state():
    seeds = Seeds(names=(5, 6), orders=(5, 6), initials=(5, 6))
    setup = set_up(mixup=0.4, ema_decay=0.5, seeds=seeds)
    shapes = seeds.shapes(jax.eval_shape(lambda: tiny.variables(NETWORK)))
    before = jax.eval_shape(lambda variables: start.new_state(setup, variables, DEVICES), shapes)
    rows = (jax.ShapeDtypeStruct((1, 2, 8), jnp.int32), jax.ShapeDtypeStruct((1, 2, 8), jnp.bool_))
    stepped, _ = jax.eval_shape(
        compile_train_steps(setup.parts, DEVICES, seeds=seeds), before, tiny.constants(DATA), *rows
    )
    assert jax.tree.map(jnp.shape, stepped) == jax.tree.map(jnp.shape, before)
    assert before.signs["conv"].shape[0] == before.moving["params"]["conv"]["kernel"].shape[0] == 2


# ---- ending early


class Scripted:
    """Gives top-1 accuracies of the validation images one after another."""

    splits = ("test", "validation")

    def __init__(self, *top1: float):
        self.top1 = list(top1)

    def __call__(self, variables: Any, split: str, **_: Any) -> dict[str, Any]:
        top1 = self.top1.pop(0) if split == "validation" else 50.0
        return {"top1": top1, "top5": 100.0, "loss": 1.0, "num_images": 6}


PLAIN = set_up(epochs=9, log_flips=False)


def test_a_stage_ends_when_the_validation_images_have_not_got_better_for_long(tmp_path):
    final = fit(tmp_path, PLAIN, evaluator=Scripted(30.0, 40.0, 40.0, 35.0, 99.0))
    assert final.step == 4 * STEPS and len(records(tmp_path)) == 4
    with CheckpointStore(tmp_path / "checkpoints", read_only=True) as store:
        assert store.best_step() == 2 * STEPS
    # Killed before the result was written: there is nothing left to train.
    again = fit(tmp_path, PLAIN, evaluator=Scripted())
    tiny.assert_equal(again, final)


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        ([], 1, False),
        ([5.0, 4.0, 3.0], 0, False),
        ([5.0, 4.0], 2, False),
        ([5.0, 5.0, 5.0], 2, True),
        ([5.0, 4.0, 6.0, 6.0], 2, False),
        ([5.0, 4.0, 6.0, 1.0, 6.0], 2, True),
    ],
)
def test_patience_counts_from_the_first_best_epoch(values, patience, expected):
    rows = [{"validation_top1": value, "test_top1": 0.0} for value in values]
    assert metrics.has_stalled(rows, patience) is expected
