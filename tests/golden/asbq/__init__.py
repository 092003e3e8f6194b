"""Checks of the ASBQ golden files, by file name.

The files come from running the published PyTorch code; their README states content and tolerances. Everything that can
differ between two files of a kind (cases, shapes, bit widths, strides, depth, classes, loss options) is read from them.
"""

from collections.abc import Callable

from tests.golden.asbq.models import check_checkpoint_eval, check_checkpoint_state, check_model
from tests.golden.asbq.parts import (
    check_activation_quantizer,
    check_blocks,
    check_conv_q,
    check_loss,
    check_masks,
    check_weight_quantizer,
)
from tests.golden.asbq.trajectory import check_trajectory
from tests.golden.comparison import Comparison, GoldenFile

CHECKS: tuple[tuple[str, Callable[[GoldenFile, Comparison], None]], ...] = (
    ("weight_quantizer", check_weight_quantizer),
    ("activation_quantizer", check_activation_quantizer),
    ("conv_q", check_conv_q),
    ("masks", check_masks),
    ("loss", check_loss),
    ("blocks", check_blocks),
    ("model_.+", check_model),
    ("checkpoint_state", check_checkpoint_state),
    ("checkpoint_eval", check_checkpoint_eval),
    ("trajectory_.+", check_trajectory),
)
