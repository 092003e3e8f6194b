"""Progress of long work: a bar on a terminal, plain lines elsewhere; of several processes the first one shows it."""

import sys
import time
from typing import Any

from bnn_jax import hosts

PLAIN_LOG_SECONDS = 30.0


def say(line: str) -> None:
    """Prints a line of the log (stderr: stdout is for results)."""
    if hosts.is_first():
        print(line, file=sys.stderr, flush=True)


def speed_text(images_per_second: float) -> str:
    """'1,234 img/s', and '0.4 img/s' where whole numbers would say too little."""
    return f"{images_per_second:,.{0 if images_per_second >= 10 else 1}f} img/s"


class Progress:
    """Shows how far some work is: on a terminal by a bar with the time left, elsewhere by lines.

    Args:
      title: name of the work, such as that of the stage.
      total: units of the whole work: steps, generations.
      done: units done before.
    """

    def __init__(self, title: str, *, total: int, done: int = 0):
        self.title, self.total, self.done = title, total, done
        # Done before, by other processes.
        self.before = done
        self._started = self._last_shown = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and hosts.is_first():
            self._bar = _bar()
            self._bar.add_task(self.title, total=self.total, completed=self.done, status="compiling ...")
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip(self, units: int) -> None:
        """Counts units that were done before."""
        self.done += units
        self.before += units

    def update(self, done: int, status: str, *, line: str | None = None) -> None:
        """Shows that ``done`` units are done.

        Args:
          done: units done.
          status: shown beside the bar; where there is none, a line at least every 30 s.
          line: printed in any case.
        """
        self.done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, status=status)
        elif time.monotonic() - self._last_shown >= PLAIN_LOG_SECONDS:
            line = line or status
        if line is not None:
            self.report(line)

    def report(self, text: str) -> None:
        """Prints a line with the title and the time left, on a terminal above the bar."""
        self._last_shown = time.monotonic()
        line = f"{self.title}: {text}  {self.time_left()} left"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            say(line)

    def time_left(self) -> str:
        """Estimated time to the end, 'H:MM:SS'; '?' before the first unit."""
        own = self.done - self.before
        if own <= 0:
            return "?"
        seconds = round((time.monotonic() - self._started) / own * max(self.total - self.done, 0))
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
