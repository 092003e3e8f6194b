"""A run that was killed or stopped goes on with the same command, and ends bit for bit as one left alone."""

import os
import signal
from typing import Any

import pytest

from bnn_jax.training.evaluate import Evaluator
from bnn_jax.training.loop import EpochMeter
from tests.integration.launching import (
    SAVE_ALWAYS,
    STAGES,
    TWO_RUNGS,
    assert_same_run,
    damage,
    launch_here,
    launch_killed,
    launch_well,
    records,
    refused,
    rungs,
    start,
    steps,
    wait,
)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path, two_rungs):
    first, second = tmp_path / STAGES[0], tmp_path / STAGES[1]
    command = (*TWO_RUNGS, SAVE_ALWAYS, f"--workdir={tmp_path}")

    launch_killed("saved", 1, *command)  # in the middle of the first epoch
    assert steps(first) == [1]

    launch_killed("recorded", 2, *command)  # the last epoch's record is written, its checkpoint is not
    assert len(records(first)) == 2 and 4 not in steps(first)

    launch_killed("finished", 1, *command)  # between two stages
    assert len(records(first)) == 2 and 4 in steps(first)
    assert (first / "result.json").exists() and not second.exists()

    launch_killed("saving", 2, *command)  # a checkpoint is half written
    assert steps(second) == [] and list((second / "checkpoints").iterdir())

    finished = launch_well(*TWO_RUNGS, f"--workdir={tmp_path}")
    assert "stage w32a32: finished before" in finished.stderr
    assert_same_run(tmp_path, two_rungs)
    # Nothing half written is left.
    assert [path.name for path in tmp_path.rglob("*tmp*")] == []


def test_a_result_that_was_not_written_is_made_from_the_last_checkpoint(two_rungs, copy_of):
    folder = copy_of(two_rungs)
    (folder / STAGES[1] / "result.json").unlink()
    finished = launch_well(*TWO_RUNGS, f"--workdir={folder}")
    assert "stage w1a1: going on from step 4" in finished.stderr and "epoch 2/2" not in finished.stderr
    assert_same_run(folder, two_rungs)


def test_with_the_newest_checkpoint_damaged_the_one_before_is_used(two_rungs, copy_of):
    folder = copy_of(two_rungs)
    (folder / STAGES[1] / "result.json").unlink()
    damage(folder / STAGES[1] / "checkpoints" / "4" / "params")
    finished = launch_well(*TWO_RUNGS, f"--workdir={folder}")
    assert "stage w1a1: going on from step 2" in finished.stderr
    assert_same_run(folder, two_rungs)


def signal_in(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, number: int, count: int) -> None:
    """Sends this process a signal at the ``count``-th call of a method."""
    original, calls = getattr(owner, name), []

    def method(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return original(self, *args, **options)

    monkeypatch.setattr(owner, name, method)


def test_a_run_stopped_by_signals_ends_as_if_nothing_had_happened(tmp_path, two_rungs, monkeypatch):
    command = (*TWO_RUNGS, f"--workdir={tmp_path}")

    with monkeypatch.context() as context:
        signal_in(context, EpochMeter, "add", number=signal.SIGTERM, count=3)  # in the second epoch
        stopped = launch_here(*command)
    assert stopped.code == 128 + signal.SIGTERM == 143
    message = "stage w32a32: stopped and saved at step 3; the same command goes on from there"
    assert stopped.stderr.splitlines()[-1] == message
    assert steps(tmp_path / STAGES[0]) == [2, 3]

    with monkeypatch.context() as context:
        signal_in(context, Evaluator, "__call__", number=signal.SIGINT, count=2)  # of the second stage's first epoch
        stopped = launch_here(*command)
    assert stopped.code == 128 + signal.SIGINT == 130
    assert "stage w32a32: going on from step 3" in stopped.stderr
    message = "stage w1a1: stopped and saved at step 2; the same command goes on from there"
    assert stopped.stderr.splitlines()[-1] == message

    finished = launch_well(*command)
    assert "stage w1a1: going on from step 2" in finished.stderr
    assert_same_run(tmp_path, two_rungs)


@pytest.mark.slow
def test_a_process_that_trains_keeps_others_out_and_stops_when_asked(tmp_path):
    command = (*rungs(32, epochs=100_000), f"--workdir={tmp_path / 'run'}")
    process = start(*command)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 1/100000" in line:
                break
        assert refused(launch_here(*command)).endswith("run: another process is training in this folder")
    finally:
        # Whatever failed above, no process is left behind.
        process.terminate()
    finished = wait(process)
    assert finished.code == 143, finished.stderr
    assert "Traceback" not in finished.stderr
    last = finished.stderr.splitlines()[-1]
    saved = steps(tmp_path / "run" / STAGES[0])[-1]
    assert last == f"stage w32a32: stopped and saved at step {saved}; the same command goes on from there"
