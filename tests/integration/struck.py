"""Runs ``launch.py`` and sends this process a signal after a training step: struck.py SIGNAL STEP ARGUMENTS...

SIGNAL is a name such as SIGKILL; STEP counts the steps that this process shows, from 1.
"""

import os
import signal
import sys
from typing import Any

import launch
from bnn_jax.training.loop import StageLoop


def main(name: str, step: int, arguments: list[str]) -> int:
    """Prepares the signal and launches."""
    original, shown = StageLoop._show, []

    def show(self: StageLoop, *args: Any) -> None:
        original(self, *args)
        shown.append(args)
        if len(shown) == step:
            os.kill(os.getpid(), signal.Signals[name])

    StageLoop._show = show  # type: ignore[method-assign]
    return launch.main(["launch.py", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
