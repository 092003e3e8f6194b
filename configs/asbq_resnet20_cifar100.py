"""ASBQ, ResNet-20 on CIFAR-100 (100 outputs; the released code hard-codes 10).

Published: no number that could be checked.
Run: python launch.py --config=configs/asbq_resnet20_cifar100.py --config.data.data_dir=DIR
Length: as asbq_resnet20.
"""

from configs import asbq_resnet20, common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = asbq_resnet20.get_config()
    config.name = "asbq_resnet20_cifar100"
    config.data.name = "cifar100"
    if argument in common.SMOKE:
        config.asbq.epochs = (1,)
    return common.variant(config, argument, image_size=32, num_classes=100)
