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


def _has_bar() -> bool:
    return sys.stderr.isatty() and hosts.is_first()


def speed_text(images_per_second: float) -> str:
    """'1,234 img/s', and '0.4 img/s' where whole numbers would say too little."""
    return f"{images_per_second:,.{0 if images_per_second >= 10 else 1}f} img/s"


class Progress:
    """Shows how far a stage is.

    On a terminal: a bar with images/s, loss, top-1 and the time left. Elsewhere: a line per epoch, and one at least
    every 30 s.

    Args:
      title: name of the stage.
      total_steps: optimiser steps of the whole stage.
      start_step: steps already done.
      epochs: epochs of the whole stage.
    """

    def __init__(self, title: str, *, total_steps: int, start_step: int, epochs: int):
        self.title, self.total_steps, self.start_step, self.epochs = title, total_steps, start_step, epochs
        self.step = start_step
        self._started = self._last_shown = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if _has_bar():
            self._bar, self._task = _make_bar(self.title, self.total_steps, self.start_step)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float, top1: float) -> None:
        """Shows the state after ``step`` steps; ``loss`` and ``top1`` (percent) are means of the epoch so far."""
        self.step = step
        speed = speed_text(images_per_second)
        status = f"epoch {epoch + 1}/{self.epochs}  {speed}  loss {loss:.3f}  top-1 {top1:.1f} %"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif time.monotonic() - self._last_shown >= PLAIN_LOG_SECONDS:
            self._last_shown = time.monotonic()
            self.say(f"{self.title}: {status}  {self.time_left()} left")

    def epoch_done(self, record: dict[str, Any]) -> None:
        """Logs an epoch's record as one line."""
        self._last_shown = time.monotonic()
        line = (
            f"{self.title}: epoch {record['epoch'] + 1}/{self.epochs}  train loss {record['train_loss']:.4f}  "
            f"train top-1 {record['train_top1']:.2f} %  test top-1 {record['test_top1']:.2f} %  "
            f"{speed_text(record['images_per_second'])}  {self.time_left()} left"
        )
        self.say(line)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            say(line)

    def time_left(self) -> str:
        """Estimated time to the end of the stage, 'H:MM:SS'."""
        done = self.step - self.start_step
        if done <= 0:
            return "?"
        seconds = round((time.monotonic() - self._started) / done * (self.total_steps - self.step))
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


class SearchProgress:
    """Shows how far a search is: a bar on a terminal, and a line for every generation there and elsewhere.

    Args:
      title: name of the stage.
      folds: number of folds.
      total: generations of all folds together.
      done: generations done before; add to it what a fold that goes on has behind it.
    """

    def __init__(self, title: str, *, folds: int, total: int, done: int):
        self.title, self.folds, self.total, self.done = title, folds, total, done
        self._own = 0
        self._started = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "SearchProgress":
        if _has_bar():
            self._bar, self._task = _make_bar(self.title, self.total, self.done)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def generation_done(self, fold: int, generation: int, best: dict[str, Any]) -> None:
        """Shows the best path after a generation.

        Args:
          fold: number of the fold, from 0.
          generation: generations done in it.
          best: ``path``, ``fold_top1`` and ``full_top1`` in percent.
        """
        self.done += 1
        self._own += 1
        status = (
            f"fold {fold + 1}/{self.folds}  generation {generation}  best {best['fold_top1']:.2f} % "
            f"(outside of the fold {best['full_top1']:.2f} %)"
        )
        line = f"{self.title}: {status}  path {' '.join(map(str, best['path']))}  {self.time_left()} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, status=status)
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            say(line)

    def time_left(self) -> str:
        """Estimated time to the end of the search, 'H:MM:SS'."""
        if self._own == 0:
            return "?"
        seconds = round((time.monotonic() - self._started) / self._own * max(self.total - self.done, 0))
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def _make_bar(title: str, total: int, completed: int):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    return bar, bar.add_task(title, total=total, completed=completed, status="compiling ...")
