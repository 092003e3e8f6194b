"""Files that are either the old one or the whole new one, whatever happens while they are written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path, *, binary: bool = False) -> Iterator[Any]:
    """Opens a file beside ``path`` that takes its place when the context ends without an error.

    Args:
      path: the file to write anew.
      binary: whether bytes are written; text is UTF-8, with the ends of lines as given.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") if binary else temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
