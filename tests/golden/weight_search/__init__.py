"""Checks of the Weight Search golden files, by file name.

The files come from running the published PyTorch code; their README states content and tolerances. Everything that can
differ between two files of a kind (cases, shapes, value sets, temperatures, seeds, schedules) is read from them.
"""

from collections.abc import Callable

from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.weight_search.models import check_net
from tests.golden.weight_search.parts import (
    check_by_bit,
    check_categorical,
    check_gumbel,
    check_layer,
    check_optimizer,
    check_published_curves,
    check_schedules,
)
from tests.golden.weight_search.training import check_train

CHECKS: tuple[tuple[str, Callable[[GoldenFile, Comparison], None]], ...] = (
    ("categorical_.+", check_categorical),
    ("gumbel", check_gumbel),
    ("layer_.+", check_layer),
    ("by_bit", check_by_bit),
    ("optimizer", check_optimizer),
    ("published_curves", check_published_curves),
    ("schedules", check_schedules),
    ("net_.+", check_net),
    ("train_.+", check_train),
)
