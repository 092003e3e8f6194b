"""ASBQ, VGG-Small on CIFAR-10; all six convolutions are quantized, 5 % of their 1x2 blocks are masked.

Published: no number that could be checked.
Run: python launch.py --config=configs/asbq_vgg_small.py --config.data.data_dir=DIR
Length: as asbq_resnet20, about 15 times the arithmetic.
"""

from configs import asbq_resnet20, common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = asbq_resnet20.get_config()
    config.name = "asbq_vgg_small"
    config.network = "vgg_small"
    if argument in common.SMOKE:
        config.asbq.epochs = (1,)
    return common.variant(config, argument, image_size=32, num_classes=10)
