"""Checks of the SNN golden files, by file name.

The files come from running the published PyTorch code; their README states content and tolerances. Everything that can
differ between two files of a kind (cases, shapes, widths, classes, states) is read from them.
"""

from collections.abc import Callable

from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.snn.accounting import ACCOUNTING
from tests.golden.snn.networks import NETWORKS
from tests.golden.snn.parts import PARTS
from tests.golden.snn.trajectory import TRAJECTORY

CHECKS: tuple[tuple[str, Callable[[GoldenFile, Comparison], None]], ...] = (
    *PARTS.items(),
    *NETWORKS.items(),
    *TRAJECTORY.items(),
    *ACCOUNTING.items(),
)
