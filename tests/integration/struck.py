"""Runs ``launch.py`` and sends this process a signal after a training step: struck.py SIGNAL STEP ARGUMENTS...

SIGNAL is a name such as SIGKILL; STEP counts the steps of this process, from 1.
"""

import os
import signal
import sys
from typing import Any

import launch
from bnn_jax.training.loop import EpochMeter


def main(name: str, step: int, arguments: list[str]) -> int:
    """Prepares the signal and launches."""
    original, added = EpochMeter.add, []

    def add(self: EpochMeter, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        added.append(args)
        if len(added) == step:
            os.kill(os.getpid(), signal.Signals[name])

    EpochMeter.add = add  # type: ignore[method-assign]
    return launch.main(["launch.py", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
