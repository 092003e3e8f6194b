"""Asking a running stage to stop: SIGTERM and SIGINT set a flag the loop looks at between dispatches."""

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that turns the first SIGTERM or SIGINT into a flag; the second one acts as usual.

    Outside the main thread no handler can be set; the flag then stays False.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal_number != 0

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
