"""Checks of the BASQ golden files, by file name.

The files come from running the published PyTorch code; their README states content and tolerances. Everything that can
differ between two files of a kind (cases, shapes, bit widths, geometry, classes, genes) is read from them.
"""

from collections.abc import Callable

from tests.golden.basq.models import check_blocks, check_distillation, check_supernet
from tests.golden.basq.parts import (
    check_clipped_activation,
    check_conv,
    check_edges,
    check_lsq_act,
    check_lsq_weight,
    check_shortcut,
)
from tests.golden.basq.searching import check_evolution, check_folds
from tests.golden.basq.training import check_finetuning, check_first_steps, check_schedules, check_trajectory
from tests.golden.comparison import Comparison, GoldenFile


def _both(*checks: Callable[[GoldenFile, Comparison], None]) -> Callable[[GoldenFile, Comparison], None]:
    def run(file: GoldenFile, result: Comparison) -> None:
        for check in checks:
            check(file, result)

    return run


CHECKS: tuple[tuple[str, Callable[[GoldenFile, Comparison], None]], ...] = (
    ("quant_basq_act", _both(check_clipped_activation, check_edges)),
    ("quant_lsq_weight", check_lsq_weight),
    ("quant_lsq_act", check_lsq_act),
    ("qtconv", check_conv),
    ("flexconn", check_shortcut),
    ("kd_loss", check_distillation),
    ("blocks", check_blocks),
    (r"supernet_tiny_w\da\d", check_supernet),
    ("schedules", check_schedules),
    ("act_lsq_init", check_first_steps),
    (r"traj_phase[12]_(zeros|none)", check_trajectory),
    ("finetune_traj", check_finetuning),
    ("evolution", check_evolution),
    ("kfold", check_folds),
)
