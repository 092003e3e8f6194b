"""What a damaged checkpoint or a full disk is answered with is the last thing printed, however often one tries.

Orbax and TensorStore work in threads of their own, which may fail long after the error was shown.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, mounted_disk
from tests.integration.launching import STAGES, TWO_RUNGS

TIMES = 8
# Each run is a process that ends as a program does; forked, so that the imports are paid for once.
PROGRAM = """
import os, pathlib, sys, warnings
sys.path.insert(0, {root!r})
warnings.simplefilter("ignore")  # jax warns of forks; no device and no thread of it has been started yet
import launch, orbax.checkpoint
import bnn_jax.command_line, bnn_jax.experiment.evaluation
import jax, jax.numpy as jnp
from bnn_jax.errors import UserError
from bnn_jax.storage.checkpoint import CheckpointStore
for number in range({times}):
    child = os.fork()
    if not child:
        os.dup2(os.open({folder!r} + f"/{{number}}.txt", os.O_CREAT | os.O_WRONLY), 2)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
"""


def errors_of(folder: Path, body: str) -> list[str]:
    """What several processes that run ``body`` print to stderr; each must end with status 2 and one line of error."""
    outputs = folder / "outputs"
    outputs.mkdir()
    program = PROGRAM.format(root=str(ROOT), times=TIMES, folder=str(outputs)) + textwrap.dedent(body)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode == 0, run.stderr
    errors = [(outputs / f"{number}.txt").read_text() for number in range(TIMES)]
    assert [line for line in run.stdout.splitlines() if line.isdecimal()] == ["2"] * TIMES, errors
    return errors


@pytest.mark.slow
def test_nothing_follows_the_error_of_a_damaged_checkpoint(two_rungs: Path, copy_of, tmp_path: Path) -> None:
    run = copy_of(two_rungs)
    for path in (run / STAGES[1] / "checkpoints").glob("*/params/**/d/*"):
        path.write_bytes(os.urandom(path.stat().st_size))
    arguments = ["launch.py", *TWO_RUNGS, f"--workdir={run}", "--mode=evaluate", "--stage=w1a1"]
    for error in errors_of(tmp_path, f"sys.exit(launch.main({arguments!r}))"):
        *others, last = error.splitlines()
        assert last.startswith("error: ") and "damaged" in last, error
        assert "Traceback" not in error and not any("RuntimeError" in line for line in others), error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    with mounted_disk(tmp_path / "disk", 2) as folder:
        yield folder


@pytest.mark.slow
def test_nothing_follows_the_error_of_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    body = f"""
    # Random numbers, since others would be packed into little space.
    arrays = {{f"layer{{number}}": jax.random.normal(jax.random.key(number), (99, 99)) for number in range(40)}}
    state = {{"step": jnp.int32(1), "params": arrays, "opt_state": arrays}}
    try:
        with CheckpointStore(pathlib.Path({str(small_disk / "checkpoints")!r})) as store:
            store.save(state, meta={{}}, metrics=None)
    except UserError as error:
        print(f"error: {{error}}", file=sys.stderr)
        sys.exit(2)
    """
    for error in errors_of(tmp_path, body):
        assert error.startswith("error: no space left on ") and len(error.splitlines()) == 1, error
