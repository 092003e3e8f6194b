"""Is asked to stop while it compiles; waits so many SECONDS for the compiler: compiling_program.py SECONDS."""

import os
import signal
import sys
import threading

import jax
import jax.numpy as jnp

from bnn_jax import hosts
from bnn_jax.training import interrupt


def work(x: jax.Array) -> jax.Array:
    """Takes a second or more to compile and nothing to run."""
    for axis in (0, 1) * 200:
        x = jnp.sin(x @ x) + jnp.sort(x, axis=axis)
    return x


def main(patience: float) -> None:
    """Prints 'compiled' if it comes to that."""
    interrupt.COMPILER_SECONDS = patience
    group = hosts.Group()
    group.goes_on_from = lambda: "step 3 of stage w1a1"
    lowered = jax.jit(work).lower(jnp.ones((8, 8)))
    with interrupt.StopRequest(group) as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        lowered.compile()
        print("compiled", stop.agreed())


if __name__ == "__main__":
    main(float(sys.argv[1]))
