"""What a search with several folds found: numbers of each fold's winner, and how to compare winners fairly.

Each fold's winner is judged on the images outside of its fold, so two winners are judged on different images. If the
folds differ in difficulty (those of the release hold 100 classes each), that decides which accuracy is high, not the
winner. ``combined`` and an accuracy on common images do not have this flaw.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean, sample standard deviation (n - 1; 0 for a single value) and range."""

    mean: float
    deviation: float
    lowest: float
    highest: float


def statistics(values: Sequence[float]) -> Statistics:
    """Statistics of one number per fold."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Statistics(float(np.mean(values)), deviation, float(np.min(values)), float(np.max(values)))


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation of two numbers per fold; None with fewer than 2 folds or where one does not vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def combined(inside: float, outside: float, *, folds: int) -> float:
    """Accuracy on all images from those inside of one of ``folds`` equal folds and outside of it."""
    return inside / folds + outside * (1 - 1 / folds)
