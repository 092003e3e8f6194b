"""Checks of the SKD-BNN golden files, by file name.

The files come from running the published PyTorch code; their README states content and tolerances. Everything that can
differ between two files of a kind (cases, shapes, widths, classes, k and t, images, states) is read from them.
"""

from collections.abc import Callable

from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.skd_bnn.mlp import check_mnist_mlp
from tests.golden.skd_bnn.models import check_fullsize, check_images_logits, check_state
from tests.golden.skd_bnn.parts import PARTS
from tests.golden.skd_bnn.training import check_train_step_vectors, check_trajectory

CHECKS: tuple[tuple[str, Callable[[GoldenFile, Comparison], None]], ...] = (
    *PARTS.items(),
    ("mnist_mlp_small", check_mnist_mlp),
    ("fullsize_(ResNet20|ResNet18|VGG_Small|ImageNet)", check_fullsize),
    (r"resnet20_(best|epoch\d+)_state", check_state),
    ("resnet20_best_images_logits", check_images_logits),
    ("resnet20_train_step_vectors", check_train_step_vectors),
    ("resnet20_trajectory", check_trajectory),
)
