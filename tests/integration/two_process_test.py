"""Two processes over loopback train as one with two devices, bit for bit, also when one of them is killed or stopped.

Each process has one CPU device; their collectives go through sockets on this machine.
"""

import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.data import makers
from tests.integration.devices_test import QUANTIZED_TOLERANCE, assert_close
from tests.integration.launching import (
    SAVE_ALWAYS,
    STAGES,
    TWO_RUNGS,
    Finished,
    assert_same_run,
    free_port,
    half_done,
    launch_program,
    launch_well,
    records,
    start,
    steps,
)
from tests.integration.streaming_test import command as streamed_command

# Of seed 1 no value lies within rounding of the edge of an activation, see devices_test.py.
COMMAND = (*TWO_RUNGS, "--config.seed=1")
STRUCK = "tests/integration/struck.py"
# On a quiet machine none takes 30 s; what hangs must not hang the test.
SECONDS = 200

pytestmark = pytest.mark.slow


def together(*commands: Sequence[str], programs: Sequence[str] = ("launch.py", "launch.py")) -> list[Finished]:
    """Runs one command in each of several processes that know of each other, and waits for all."""
    count = len(commands)
    peers = (f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}", "--connect_seconds=60")
    processes = [
        start(*command, *peers, f"--process_id={index}", "--heartbeat_seconds=20", program=program, XLA_FLAGS="")
        for index, (command, program) in enumerate(zip(commands, programs, strict=True))
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        outputs = [process.communicate() for process in processes]
        raise AssertionError("\n".join(error for _, error in outputs)) from None
    return [Finished(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def our_lines(stderr: str) -> list[str]:
    """Errors and the log of the work; while a connection ends, jaxlib may log lines of its own beside them."""
    return [line for line in stderr.splitlines() if line.startswith(("error: ", "stage ", "w32a32", "w1a1", "moved "))]


def train_together(folder: Path) -> list[Finished]:
    """Trains on two processes, or goes on."""
    command = (*COMMAND, f"--workdir={folder}", "--json")
    finished = together(command, command)
    assert [one.code for one in finished] == [0, 0], finished[0].stderr + finished[1].stderr
    return finished


def strike(folder: Path, *, victim: int, name: str, step: int) -> list[Finished]:
    """Trains on two processes, of which one gets a signal after a step."""
    command = (*COMMAND, SAVE_ALWAYS, f"--workdir={folder}")
    commands, programs = [command, command], ["launch.py", "launch.py"]
    commands[victim], programs[victim] = (name, str(step), *command), STRUCK
    return together(*commands, programs=programs)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Finished]]:
    """The folder of a run on two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("two_processes") / "run"
    return folder, train_together(folder)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one process with two devices."""
    folder = tmp_path_factory.mktemp("one_process") / "run"
    flags = "--xla_force_host_platform_device_count=2"
    finished = launch_program(*COMMAND, f"--workdir={folder}", XLA_FLAGS=flags)
    assert finished.code == 0, finished.stderr
    return folder


def test_two_processes_train_as_one_with_two_devices(of_two, of_one):
    assert_same_run(of_two[0], of_one)


def test_of_two_processes_one_speaks(of_two):
    first, second = of_two[1]
    assert first.last_json["stages"][1]["device"] == "2 x cpu (cpu)"
    assert "w1a1: epoch 2/2" in first.stderr and "top-1 last" in first.stdout
    # Gloo, the library behind the collectives of CPUs, prints one line of its own.
    assert [line for line in second.stdout.splitlines() if not line.startswith("[Gloo]")] == []
    assert our_lines(second.stderr) == []


def test_two_processes_of_which_one_is_killed_and_one_stopped_end_as_if_nothing_had_happened(of_one, tmp_path):
    # A checkpoint of one process, from which two go on.
    folder = Path(shutil.copytree(of_one, tmp_path / "run"))
    first, second = (folder / stage for stage in STAGES)
    (first / "result.json").unlink()
    shutil.rmtree(first / "checkpoints" / "4")
    shutil.rmtree(second)

    # In the second epoch of the first stage one is killed.
    survivor, victim = strike(folder, victim=1, name="SIGKILL", step=1)
    assert (victim.code, survivor.code) == (-signal.SIGKILL, 1)
    assert "stage w32a32: going on from step 2" in survivor.stderr and "Traceback" not in survivor.stderr
    assert survivor.stderr.splitlines()[-1] == (
        "error: process 0 of 2 lost contact with another process; what was saved is kept, "
        f"the same command on all hosts goes on from step {steps(first)[-1]} of stage w32a32"
    )

    # In the first epoch of the second stage one is asked to stop, and both do.
    left = 4 - steps(first)[-1]
    stopped = strike(folder, victim=1, name="SIGTERM", step=left + 1)
    assert [one.code for one in stopped] == [143, 143], stopped[0].stderr + stopped[1].stderr
    saved = steps(second)[-1]
    message = f"stage w1a1: stopped and saved at step {saved}; the same command goes on from there"
    assert stopped[0].stderr.splitlines()[-1] == message
    assert our_lines(stopped[1].stderr) == []

    finished = train_together(folder)
    assert f"stage w1a1: going on from step {saved}" in finished[0].stderr
    assert_same_run(folder, of_one)


def test_a_checkpoint_of_two_processes_is_evaluated_on_one(of_two):
    folder, _ = of_two
    finished = launch_well(*COMMAND, f"--workdir={folder}", "--mode=evaluate", "--json")
    record = records(folder / STAGES[1])[-1]
    assert finished.last_json["top1"] == record["test_top1"]
    # Sums over the images in another order.
    assert finished.last_json["loss"] == pytest.approx(record["test_loss"], rel=1e-5)


def test_two_processes_evaluate_what_one_trained(of_one):
    command = (*COMMAND, f"--workdir={of_one}", "--mode=evaluate", "--json")
    first, second = together(command, command)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    record = records(of_one / STAGES[1])[-1]
    assert (first.last_json["top1"], first.last_json["loss"]) == (record["test_top1"], record["test_loss"])


def test_a_stage_begun_on_two_processes_goes_on_on_one(of_two, tmp_path):
    folder = half_done(of_two[0], tmp_path / "run")
    finished = launch_well(*COMMAND, f"--workdir={folder}")
    assert "stage w1a1: going on from step 2" in finished.stderr
    assert_close(folder / STAGES[1], of_two[0] / STAGES[1], QUANTIZED_TOLERANCE)


def test_two_processes_that_read_their_images_train_as_one_with_two_devices(tmp_path):
    data_dir = makers.write_imagenet(
        tmp_path / "data", makers.small_pictures(11, seed=1), makers.small_pictures(3, seed=2)
    )
    folders = {name: tmp_path / name for name in ("two", "one")}
    commands = {
        name: streamed_command(data_dir, folder, "--config.asbq.epochs=(1,)") for name, folder in folders.items()
    }
    finished = together(commands["two"], commands["two"])
    assert [one.code for one in finished] == [0, 0], finished[0].stderr + finished[1].stderr
    flags = "--xla_force_host_platform_device_count=2"
    alone = launch_program(*commands["one"], XLA_FLAGS=flags)
    assert alone.code == 0, alone.stderr
    assert_same_run(folders["two"], folders["one"], STAGES[:1])


def test_two_processes_with_another_command_each_end_with_one_error(tmp_path):
    command = (*COMMAND, f"--workdir={tmp_path / 'run'}")
    finished = together(command, (*command, "--config.train.momentum=0.8"))
    assert [one.code for one in finished] == [2, 2]
    lines = [line for one in finished for line in our_lines(one.stderr) if line.startswith("error: ")]
    assert lines == [
        "error: process 1: another command than that of process 0: config.train.momentum '0.8' here, '0.9' there"
    ]
    assert not (tmp_path / "run").exists()
