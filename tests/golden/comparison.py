"""Reading a golden file and collecting its comparisons.

A check compares as much as it can and fails at the end, so that one run shows everything that is wrong. An array nobody
read, a NaN, another shape or a file without a single comparison is a failure too.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike


class GoldenMismatch(AssertionError):
    """Our values are not those of a golden file.

    Attributes:
      found: names of the comparisons that failed.
    """

    def __init__(self, message: str, found: tuple[str, ...]):
        super().__init__(message)
        self.found = found


class GoldenFile:
    """The arrays of one .npz file; remembers which were read.

    Attributes:
      path: the file.
      nudge: seed of a change of the images ``x`` by their last bit; 0: none.
    """

    def __init__(self, path: pathlib.Path, *, nudge: int = 0):
        self.path = path
        with np.load(path, allow_pickle=False) as archive:
            self._arrays = {name: archive[name] for name in archive.files}
        if nudge and "x" in self:
            # Less than the last bit of the sums these images enter.
            signs = np.random.default_rng(nudge).choice([-1, 0, 1], self._arrays["x"].shape)
            self._arrays["x"] = (self._arrays["x"] * (1 + signs * 2.0**-23)).astype(np.float32)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self._read.add(name)
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def get(self, name: str) -> np.ndarray | None:
        """The array, or None where there is none."""
        if name not in self:
            return None
        return self[name]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose name begins with ``prefix``, by the rest of their name."""
        return {name[len(prefix) :]: self[name] for name in self if name.startswith(prefix)}

    def cases(self, pattern: str) -> list[re.Match[str]]:
        """Matches of ``pattern`` at the beginning of the names, each text once, in the file's order."""
        found = (re.match(pattern, name) for name in self)
        return list({match.group(): match for match in found if match}.values())

    def not_compared(self, pattern: str) -> None:
        """Marks arrays that help to judge the others and are compared with nothing."""
        self._read.update(name for name in self if re.fullmatch(pattern, name))

    @property
    def unread(self) -> list[str]:
        """Names of the arrays no check has looked at."""
        return [name for name in self if name not in self._read]


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: the error and the tolerance at the element where their ratio is largest."""

    what: str
    error: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """Error in units of the tolerance; above 1 is a mismatch."""
        if self.tolerance > 0:
            return self.error / self.tolerance
        return 0.0 if self.error == 0 else np.inf

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.2e}, tolerance {self.tolerance:.2e}"


class Comparison:
    """All comparisons of one file.

    Attributes:
      rows: the comparisons so far.
      notes: what else the summary line should say.
    """

    def __init__(self):
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def close(
        self,
        what: str,
        own: ArrayLike,
        reference: ArrayLike,
        *,
        atol: ArrayLike = 0.0,
        rtol: float = 0.0,
        where: np.ndarray | None = None,
    ) -> None:
        """Compares element by element: ``|own - reference| <= atol + rtol * |reference|``, where ``where`` is True."""
        own, reference = np.asarray(own, np.float64), np.asarray(reference, np.float64)
        if own.shape != reference.shape:
            self.require(f"{what}: shape {own.shape} instead of {reference.shape}", False)
            return
        chosen = np.ones(own.shape, bool) if where is None else where
        error = np.abs(own - reference)[chosen]
        tolerance = np.broadcast_to(atol + rtol * np.abs(reference), own.shape)[chosen]
        if not error.size:
            return
        error = np.where(np.isnan(error), np.inf, error)
        worst = np.argmax(error / tolerance) if np.all(tolerance > 0) else np.argmax(error)
        self.rows.append(Row(what, float(error.flat[worst]), float(tolerance.flat[worst])))

    def exact(self, what: str, own: ArrayLike, reference: ArrayLike) -> None:
        """Compares for equality; the error is the number of elements that differ."""
        own, reference = np.asarray(own), np.asarray(reference)
        if own.shape != reference.shape:
            self.require(f"{what}: shape {own.shape} instead of {reference.shape}", False)
            return
        self.rows.append(Row(what, float(np.sum(own != reference)), 0.0))

    def at_most(self, what: str, value: float, limit: float) -> None:
        """Requires ``value <= limit``."""
        self.rows.append(Row(what, np.inf if np.isnan(value) else float(value), float(limit)))

    def require(self, what: str, condition: bool) -> None:
        """Requires a condition; ``what`` says what was expected."""
        self.rows.append(Row(what, 0.0 if condition else np.inf, 0.0))

    @property
    def worst(self) -> Row:
        """The comparison that comes closest to, or furthest beyond, its tolerance."""
        return max(self.rows, key=lambda row: row.ratio)

    @property
    def line(self) -> str:
        """One line for the summary."""
        if not self.rows:
            return "nothing compared"
        return "; ".join([f"{len(self.rows)} comparisons, largest: {self.worst}", *self.notes])

    def finish(self, file: GoldenFile) -> None:
        """Raises GoldenMismatch unless everything was read, something was compared, and all of it agrees."""
        bad = sorted((row for row in self.rows if not row.ratio <= 1), key=lambda row: -row.ratio)
        problems = [str(row) for row in bad[:10]]
        if len(bad) > 10:
            problems.append(f"and {len(bad) - 10} more")
        if not self.rows:
            problems.append("nothing was compared")
        if file.unread:
            problems.append(f"arrays no check has read: {', '.join(file.unread[:10])} ({len(file.unread)} in all)")
        if problems:
            raise GoldenMismatch(f"{file.path.name}: " + "\n  ".join(problems), tuple(row.what for row in bad))
