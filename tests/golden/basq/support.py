"""What the BASQ checks share."""

import numpy as np
from numpy.typing import ArrayLike

from tests.golden.comparison import Comparison


def relative_to_largest(result: Comparison, what: str, own: ArrayLike, reference: ArrayLike, tolerance: float) -> None:
    """Compares with a tolerance relative to the largest magnitude of the reference."""
    largest = float(np.max(np.abs(reference), initial=0.0))
    result.close(what, own, reference, atol=tolerance * max(largest, 1e-12))
