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

# How near a case comes to a sign's threshold, and how far float32 and float64 differ in the original: these help to
# judge the other arrays and are compared with nothing.
MARGINS = r"(.*[_/])?(min_(abs|rel)|f32_f64)_.+"


def _apart_from_margins(check: Callable[[GoldenFile, Comparison], None]) -> Callable[[GoldenFile, Comparison], None]:
    def run(file: GoldenFile, result: Comparison) -> None:
        file.not_compared(MARGINS)
        check(file, result)

    return run


CHECKS: tuple[tuple[str, Callable[[GoldenFile, Comparison], None]], ...] = tuple(
    (pattern, _apart_from_margins(check))
    for pattern, check in (
        *PARTS.items(),
        ("mnist_mlp_small", check_mnist_mlp),
        ("fullsize_(ResNet20|ResNet18|VGG_Small|ImageNet)", check_fullsize),
        ("resnet20_.+_state", check_state),
        ("resnet20_.+_images_logits", check_images_logits),
        ("resnet20_train_step_vectors", check_train_step_vectors),
        ("resnet20_trajectory", check_trajectory),
    )
)
