"""Checks of the SKD-BNN golden files, by file name.

The files come from running the published PyTorch code; their README states content and tolerances. Everything that can
differ between two files of a kind (cases, shapes, widths, classes, k and t, images, states) is read from them.
"""

from collections.abc import Callable

from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.skd_bnn.mlp import check_mnist_mlp

CHECKS: tuple[tuple[str, Callable[[GoldenFile, Comparison], None]], ...] = (("mnist_mlp_small", check_mnist_mlp),)
