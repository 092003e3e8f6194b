"""Running ``launch.py``, here or in a process of its own, and comparing what two runs left behind."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint

import launch
from tests.conftest import ROOT

QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}:smoke"
RATES = {32: "0.1", 8: "0.05", 4: "0.05", 2: "0.02", 1: "0.02"}


def rungs(*bits: int, epochs: int = 2) -> tuple[str, ...]:
    """Flags of a part of the quickstart chain; the rates are the config's own, so that compiled programs are shared."""
    rates = ",".join(RATES[b] for b in bits)
    return (
        QUICKSTART,
        f"--config.asbq.bits=({','.join(map(str, bits))},)",
        f"--config.asbq.learning_rates=({rates},)",
        f"--config.asbq.epochs=({epochs},)",
    )


# Two epochs of two steps each: enough for every place at which a run can be stopped.
TWO_RUNGS = rungs(32, 1)
STAGES = ("00_w32a32", "01_w1a1")
SAVE_ALWAYS = "--config.train.checkpoint_seconds=0"

ITEMS = ("params", "batch_stats", "quant_state", "knobs", "opt_state", "objective_state", "metric_sums", "rng", "step")
TIMES = {"seconds", "images_per_second", "process_seconds"}
TIMEOUT_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a launch left: exit status and both outputs."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_json(self) -> dict[str, Any]:
        """The object in the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def error_line(self) -> str:
        """The one line that tells the mistake; fails if there is none, several, or a traceback."""
        lines = self.stderr.splitlines()
        assert "Traceback" not in self.stderr + self.stdout
        assert [line.startswith("error: ") for line in lines].count(True) == 1, self.stderr
        assert lines[-1].startswith("error: "), self.stderr
        return lines[-1]


def launch_here(*arguments: str) -> Finished:
    """Runs the command line in this process: no seconds for importing jax again."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = launch.main(["launch.py", *arguments])
    return Finished(code, stdout.getvalue(), stderr.getvalue())


def launch_well(*arguments: str) -> Finished:
    """Runs the command line in this process, which must succeed."""
    finished = launch_here(*arguments)
    assert finished.code == 0, finished.stderr
    return finished


def start(*arguments: str, program: str = "launch.py", **environment: str) -> subprocess.Popen:
    """Starts a program of the checkout in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen) -> Finished:
    """Waits for a started program."""
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    except BaseException:
        process.kill()
        raise
    return Finished(process.returncode, stdout, stderr)


def launch_program(*arguments: str, program: str = "launch.py", **environment: str) -> Finished:
    """Runs a program of the checkout in a process of its own, as a user does."""
    return wait(start(*arguments, program=program, **environment))


def launch_killed(place: str, count: int, *arguments: str) -> None:
    """Runs the command line in a process that is killed at a place, see killed.py."""
    finished = launch_program(place, str(count), *arguments, program="tests/integration/killed.py")
    assert finished.code == -signal.SIGKILL, finished.stderr


def refused(finished: Finished) -> str:
    """The error line of a launch that was refused before anything was trained."""
    assert finished.code == 2
    assert "epoch 1/" not in finished.stderr
    return finished.error_line


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def half_done(folder: Path, target: Path) -> Path:
    """A copy of a run of ``TWO_RUNGS`` as it was in the middle of its second stage."""
    shutil.copytree(folder, target)
    (target / STAGES[1] / "result.json").unlink()
    shutil.rmtree(target / STAGES[1] / "checkpoints" / "4")
    return target


def records(stage: Path) -> list[dict[str, Any]]:
    """A stage's metrics without what takes another time in every run."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def result(stage: Path) -> dict[str, Any]:
    """A stage's result without times."""
    content = json.loads((stage / "result.json").read_text())
    return {key: value for key, value in content.items() if key not in TIMES}


def damage(folder: Path) -> None:
    """Changes one byte in the middle of every file of a folder: which of them are read is not ours to know."""
    for path in folder.rglob("*"):
        if path.is_file() and (content := bytearray(path.read_bytes())):
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)


def steps(stage: Path) -> list[int]:
    """Steps of a stage's checkpoints."""
    return sorted(int(path.name) for path in (stage / "checkpoints").iterdir() if path.name.isdecimal())


def saved_arrays(stage: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, the last by default, by path; read without our own code."""
    folder = stage / "checkpoints" / str(steps(stage)[-1] if step is None else step)
    arrays = {}
    handler = orbax.checkpoint.PyTreeCheckpointer()
    for item in ITEMS:
        if (folder / item).exists():
            flat = orbax.checkpoint.utils.to_flat_dict(handler.restore(folder / item), sep="/", keep_empty_nodes=False)
            arrays.update({f"{item}/{path}": np.asarray(value) for path, value in flat.items()})
    return arrays


def assert_same_arrays(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def assert_same_run(actual: Path, expected: Path, stages: tuple[str, ...] = STAGES) -> None:
    """Parameters, optimiser and metrics of two run folders are the same, bit for bit, but for times."""
    for stage in stages:
        assert records(actual / stage) == records(expected / stage)
        assert result(actual / stage) == result(expected / stage)
        assert_same_arrays(saved_arrays(actual / stage), saved_arrays(expected / stage))
