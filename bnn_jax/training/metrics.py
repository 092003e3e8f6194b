"""The record of a stage: one JSON line per epoch, appended as it happens and cut back on resume.

Of several processes the first one writes; the others may only read what was written before a decision they shared.
"""

import csv
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnn_jax import files, hosts, run_files
from bnn_jax.errors import UserError


def append(path: Path, record: dict[str, Any]) -> None:
    """Appends one record and makes sure it is on the disk."""
    if not hosts.is_first():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, *, epochs: int | None = None, shape: Any = None) -> list[dict[str, Any]]:
    """All complete records; a last line cut short by a crash is left out.

    Args:
      path: the file.
      epochs: how many there must be; None: as many as there are.
      shape: of a record, see ``run_files``; by default that of any stage.

    Raises:
      UserError: a line is damaged, or an epoch is missing.
    """
    if not path.exists():
        return [] if epochs is None else _all_epochs([], epochs, path)
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(run_files.MOST_BYTES + 1), b""), start=1):
            try:
                record = run_files.parse(line)
                wrong = run_files.problem(record, shape or run_files.record())
            except ValueError as error:
                if not file.read(1):
                    break
                wrong = str(error)
            if wrong or record["epoch"] != number - 1:
                wrong = wrong or f"epoch={record['epoch']}: accepted is {number - 1}"
                raise UserError(f"{path}: line {number} is damaged: {wrong}; {_remedy(path)}")
            records.append(record)
    return records if epochs is None else _all_epochs(records, epochs, path)


def _all_epochs(records: list[dict[str, Any]], epochs: int, path: Path) -> list[dict[str, Any]]:
    """The records; raises a UserError unless they are those of so many epochs, with the same fields."""
    if len(records) != epochs:
        raise UserError(f"{path} has the records of {len(records)} epochs: accepted are {epochs}; {_remedy(path)}")
    for first, second in itertools.pairwise(records):
        if first.keys() != second.keys() or len(first.get("seeds", ())) != len(second.get("seeds", ())):
            number = second["epoch"] + 1
            raise UserError(f"{path}: line {number} is damaged: accepted are the fields of line 1; {_remedy(path)}")
    return records


def _remedy(path: Path) -> str:
    return f"--stage={path.parent.name.partition('_')[2]} trains the stage again"


def cut_back(path: Path, step: int, *, epochs: int | None = None, shape: Any = None) -> list[dict[str, Any]]:
    """Drops the records after ``step``, which are about to be made again, and returns the others.

    Args:
      path: the file.
      step: optimiser steps done.
      epochs: how many records there must be up to this step; None: any number.
      shape: of a record, see ``run_files``; by default that of any stage.

    Raises:
      UserError: a line is damaged, or an epoch is missing.
    """
    return hosts.from_first("cut back", lambda: _cut_back(path, step, epochs, shape))


def _cut_back(path: Path, step: int, epochs: int | None, shape: Any) -> list[dict[str, Any]]:
    kept = [record for record in read(path, shape=shape) if record["step"] <= step]
    if epochs is not None:
        _all_epochs(kept, epochs, path)
    if path.exists():
        with files.replacing(path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
    return kept


def selection(record: Mapping[str, Any]) -> float:
    """What the best epoch is chosen by: top-1 on images held out of training, or on the test images without any."""
    return record.get("validation_top1", record["test_top1"])


def has_stalled(records: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether a stage ends early: the best of its epochs, the first of equal ones, is ``patience`` or more back.

    Args:
      records: of all epochs so far.
      patience: in epochs; with 0 a stage never ends early.
    """
    values = [selection(record) for record in records]
    return bool(values) and 0 < patience < len(values) - values.index(max(values))


def write_csv(records: list[dict[str, Any]], path: Path) -> None:
    """Writes the records as a table for other programs: a row for each epoch, a column for each key.

    Args:
      records: of one stage.
      path: file to write, in one step.
    """
    columns = list(dict.fromkeys(key for record in records for key in record))
    with files.replacing(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
