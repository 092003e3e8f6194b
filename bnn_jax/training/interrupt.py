"""Asking a running stage to stop: SIGTERM and SIGINT set a flag the loop looks at between dispatches.

With several processes one that is asked asks the others: a small maximum over the devices, queued between dispatches
and read two calls later, when the dispatches before it are done anyway. So nobody waits for it, and all stop at the
same step.
"""

import collections
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import hosts
from bnn_jax.training.devices import all_devices

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Answers that may be under way; the loop has as many dispatches ahead.
ANSWERS_AHEAD = 2
# How long a stop waits for a compiler, and where jax traces, lowers and compiles.
COMPILER_SECONDS = 3.0
COMPILER_MODULES = {"jax._src.compiler", "jax._src.interpreters.mlir", "jax._src.interpreters.partial_eval"}
POLL_SECONDS = 0.1


class Agreement:
    """The largest of one number of each process, known to all at the same place; all call it at the same places.

    On several processes it comes ``ANSWERS_AHEAD`` calls later, so that nobody waits for the steps under way.
    """

    def __init__(self) -> None:
        self._answers: collections.deque[jax.Array] = collections.deque()
        self._largest: Any = None

    def largest(self, number: int, *, at_once: bool = False) -> int:
        """The first largest number that is not 0 among the answers that are due; what is under way is then dropped.

        Args:
          number: of this process, int32, not negative.
          at_once: wait for all answers, for places where there are no steps to wait for.
        """
        if hosts.count() == 1:
            return number
        self._answers.append(self._queue(number))
        while len(self._answers) > (0 if at_once else ANSWERS_AHEAD):
            answer = int(np.asarray(self._answers.popleft().addressable_data(0)))
            if answer:
                self._answers.clear()
                return answer
        return 0

    def _queue(self, number: int) -> jax.Array:
        """Starts the maximum over the processes."""
        devices = all_devices()
        if self._largest is None:
            self._largest = jax.jit(jnp.max, out_shardings=devices.replicated)
        own = jax.make_array_from_callback((devices.count,), devices.rows, lambda _: np.full(1, number, np.int32))
        return self._largest(own)


class StopRequest:
    """Context manager that turns the first SIGTERM or SIGINT into a flag; the second one acts as usual.

    Python hears of a signal only when the compiler returns. With a ``group`` a stop does not wait for that: a thread
    ends the process, and nothing is lost that a checkpoint holds.

    Outside the main thread no handler can be set; the flag then stays False.

    Args:
      group: ends this process, and the others, if a signal comes while a program is compiled; None: wait.
    """

    def __init__(self, group: hosts.Group | None = None) -> None:
        self.signal_number = 0
        self._group = group
        self._previous: dict[int, Any] = {}
        self._agreement = Agreement()
        self._watch = contextlib.ExitStack()
        # Set when the work has heard of the signal, or is done.
        self._heard = threading.Event()

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def agreed(self, *, at_once: bool = False) -> bool:
        """Whether any process was asked to stop; the same answer everywhere, and then ``signal_number`` too.

        All processes call it at the same places. On one process it is the flag itself; on several, a signal shows
        ``ANSWERS_AHEAD`` calls later.

        Args:
          at_once: wait for the answers under way, for places where there are no steps to wait for.
        """
        if hosts.count() == 1:
            stop = bool(self)
        elif stop := (number := self._agreement.largest(self.signal_number, at_once=at_once)) != 0:
            self.signal_number = number
        if stop:
            self._heard.set()
        return stop

    def __enter__(self) -> "StopRequest":
        try:
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread
            self._previous = {}
        else:
            if self._group is not None:
                self._watch.callback(self._start_watch(self._group))
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()
        self._watch.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _start_watch(self, group: hosts.Group) -> Callable[[], None]:
        """Starts the thread that hears of a signal at once; returns what ends it."""
        here, there = socket.socketpair()
        there.setblocking(False)
        previous = signal.set_wakeup_fd(there.fileno())
        watch = threading.Thread(target=self._end_while_compiling, args=(group, here), name="stop", daemon=True)
        watch.start()

        def end() -> None:
            self._heard.set()
            signal.set_wakeup_fd(previous)
            there.close()
            watch.join()
            here.close()

        return end

    def _end_while_compiling(self, group: hosts.Group, signals: socket.socket) -> None:
        received = signals.recv(1)
        # Of several processes one that has heard of it already lets all agree, however long the others compile.
        agrees = hosts.count() > 1 and (bool(self.signal_number) or not _is_compiling())
        if not received or agrees or self._heard.wait(COMPILER_SECONDS):
            return
        while not _is_compiling():
            if self._heard.wait(POLL_SECONDS):
                return
        message = f"stopped while compiling; the same command goes on from {group.goes_on_from()}"
        hosts.leave(group.fail(128 + received[0], message, label=""))


def _is_compiling() -> bool:
    """Whether the main thread is inside of jax's compiler."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__") in COMPILER_MODULES:
            return True
        frame = frame.f_back
    return False
