"""IR-Net, ResNet-20 on CIFAR-10: the base of SKD-BNN alone, with its recipe and without distillation.

Published: 86.5 (IR-Net, 400 epochs and another recipe).
Run: python launch.py --config=configs/irnet_resnet20.py --config.data.data_dir=DIR
Length: 700 epochs of 390 steps.
"""

from configs import common, skd_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = skd_resnet20.get_config()
    config.name = "irnet_resnet20"
    config.skd.distill = False
    if argument in common.SMOKE:
        config.skd.epochs = (2,)
        config.skd.warmup_epochs = (1,)
    return common.variant(config, argument, image_size=32, num_classes=10)
