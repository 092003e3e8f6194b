"""The record of a stage: one JSON line per epoch, appended as it happens and cut back on resume.

Of several processes the first one writes; the others may only read what was written before a decision they shared.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

from bnn_jax import files, hosts
from bnn_jax.errors import UserError


def append(path: Path, record: dict[str, Any]) -> None:
    """Appends one record and makes sure it is on the disk."""
    if not hosts.is_first():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All complete records; a last line cut short by a crash is left out.

    Raises:
      UserError: a line in the middle is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None and number < len(lines):
            raise UserError(f"{path}: line {number} is damaged; remove that line to go on")
        if record is not None:
            records.append(record)
    return records


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record a line holds, or None if it is damaged."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) and "step" in record else None


def cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the records after ``step``, which are about to be made again, and returns the others."""
    return hosts.from_first("cut back", lambda: _cut_back(path, step))


def _cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    records = read(path)
    kept = [record for record in records if record["step"] <= step]
    if path.exists():
        with files.replacing(path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
    return kept


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
