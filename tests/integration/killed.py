"""Runs ``launch.py`` and kills it, as ``kill -9`` does, at a chosen place: killed.py PLACE COUNT ARGUMENTS...

Places, each at its COUNT-th time (from 1):
  saved      a checkpoint is complete
  saving     a checkpoint is written but has not yet got its name
  recorded   an epoch's record is written, its checkpoint is not
  finished   a stage's result is written
  evaluated  a search has evaluated paths, or the best one outside of its fold; the generation is not saved
  generation a generation of a search is saved
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import launch
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment import search as search_stage
from bnn_jax.storage.checkpoint import CheckpointStore
from bnn_jax.training import metrics
from bnn_jax.training.evaluate import PathEvaluator


def kill_in(
    owner: Any, name: str, *, count: int, before: bool = False, only: Callable[..., bool] = lambda *_: True
) -> None:
    """Kills the process before or after the ``count``-th call of a function, of those calls that ``only`` accepts."""
    original, calls = getattr(owner, name), []

    def function(*args: Any, **options: Any) -> Any:
        counts = only(*args)
        calls.extend([name] * counts)
        if counts and before and len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if counts and len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, function)


def main(place: str, count: int, arguments: list[str]) -> int:
    """Prepares the place and launches."""
    if place == "saved":
        kill_in(CheckpointStore, "_write", count=count)
    elif place == "saving":
        for name in ("rename", "replace"):
            kill_in(os, name, count=count, before=True, only=lambda source, *_: "checkpoint-tmp" in os.fspath(source))
    elif place == "recorded":
        kill_in(metrics, "append", count=count)
    elif place == "finished":
        kill_in(run_folder, "write_json", count=count, only=lambda path, *_: path.name == run_folder.RESULT)
    elif place == "evaluated":
        kill_in(PathEvaluator, "__call__", count=count)
    elif place == "generation":
        kill_in(run_folder, "write_json", count=count, only=lambda path, *_: path.name == search_stage.STATE)
    else:
        raise ValueError(f"place {place!r}")
    return launch.main(["launch.py", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
