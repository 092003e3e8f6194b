"""Asking a running stage to stop: SIGTERM and SIGINT set a flag the loop looks at between dispatches.

With several processes one that is asked asks the others: a small maximum over the devices, queued between dispatches
and read two calls later, when the dispatches before it are done anyway. So nobody waits for it, and all stop at the
same step.
"""

import collections
import signal
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

    Outside the main thread no handler can be set; the flag then stays False.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, Any] = {}
        self._agreement = Agreement()

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
            return bool(self)
        number = self._agreement.largest(self.signal_number, at_once=at_once)
        if number:
            self.signal_number = number
        return number != 0

    def __enter__(self) -> "StopRequest":
        try:
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread
            self._previous = {}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
