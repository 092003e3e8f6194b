"""The record of a stage for other programs, beside ``metrics.jsonl``: TensorBoard's event files, Weights & Biases.

Such files can only grow, and a killed run goes on before its last record. So whoever goes on removes what was written
of the stage and writes it anew, from the records that are left: no value is there twice, and none is missing. Of
several processes the first one writes.
"""

import contextlib
import importlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnn_jax import hosts
from bnn_jax.training.seeds import table_row

EVENTS, WANDB = "tensorboard", "wandb"


class Writer:
    """Base class, which writes nothing; ``start`` comes first, ``write`` after every epoch, ``close`` last."""

    def start(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Removes what is there and writes the records that a run goes on from."""
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record."""

    def close(self) -> None:
        """Writes what is held back."""


class TensorBoardWriter(Writer):
    """Event files, ``<stage>/tensorboard/events.out.tfevents.*``, at the optimiser steps done.

    Args:
      folder: the stage's folder.
    """

    def __init__(self, folder: Path):
        self._folder, self._events = folder / EVENTS, None

    def start(self, records: Sequence[Mapping[str, Any]]) -> None:
        """See ``Writer``."""
        for path in self._folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._events = importlib.import_module("tensorboardX").SummaryWriter(str(self._folder))
        super().start(records)

    def write(self, record: Mapping[str, Any]) -> None:
        """See ``Writer``."""
        assert self._events is not None  # ``start`` comes first
        for name, value in scalars(record).items():
            self._events.add_scalar(name, value, record["step"])
        self._events.flush()

    def close(self) -> None:
        """See ``Writer``."""
        if self._events is not None:
            self._events.close()


class WandbWriter(Writer):
    """An offline run, ``<stage>/wandb/offline-run-*``, which ``wandb sync`` uploads; a run for each stage.

    Args:
      folder: the stage's folder.
      config: of the run.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self._folder, self._config, self._run = folder, config, None

    def start(self, records: Sequence[Mapping[str, Any]]) -> None:
        """See ``Writer``."""
        shutil.rmtree(self._folder / WANDB, ignore_errors=True)
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            mode="offline",
            dir=str(self._folder),
            project="bnn_jax",
            group=self._config["name"],
            name=f"{self._config['name']} {self._folder.name}",
            config=dict(self._config),
            settings=wandb.Settings(console="off", silent=True),
        )
        super().start(records)

    def write(self, record: Mapping[str, Any]) -> None:
        """See ``Writer``."""
        assert self._run is not None  # ``start`` comes first
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        """See ``Writer``."""
        if self._run is not None:
            self._run.finish()


class Writers(Writer):
    """Several writers as one."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def start(self, records: Sequence[Mapping[str, Any]]) -> None:
        """See ``Writer``."""
        for writer in self._writers:
            writer.start(records)

    def write(self, record: Mapping[str, Any]) -> None:
        """See ``Writer``."""
        for writer in self._writers:
            writer.write(record)

    def close(self) -> None:
        """See ``Writer``."""
        for writer in self._writers:
            writer.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, of each seed too; without the step, at which they stand."""
    return {name: value for name, value in table_row(record).items() if name != "step" and not isinstance(value, str)}


@contextlib.contextmanager
def open_writer(config: Mapping[str, Any], folder: Path) -> Iterator[Writer]:
    """What ``config.log`` asks for, closed in the end.

    Args:
      config: of the run.
      folder: the stage's folder.
    """
    chosen: list[Writer] = [TensorBoardWriter(folder)] if config["log"]["tensorboard"] else []
    chosen += [WandbWriter(folder, config)] if config["log"]["wandb"] else []
    writer = Writers(*chosen) if hosts.is_first() else Writer()
    try:
        yield writer
    finally:
        writer.close()
