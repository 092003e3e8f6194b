"""SKD-BNN, VGG-Small on CIFAR-10.

Published (best epoch on the first 9,984 test images): 91.376; last ten epochs 91.14.
Run: python launch.py --config=configs/skd_vgg_small.py --config.data.data_dir=DIR
Length: 600 epochs of 390 steps.
"""

from configs import common, skd_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = skd_resnet20.get_config()
    config.name = "skd_vgg_small"
    config.network = "hardtanh_vgg_small"
    config.skd.epochs = (600,)
    config.skd.learning_rates = (0.05,)
    if argument in common.SMOKE:
        config.skd.epochs = (2,)
        config.skd.warmup_epochs = (1,)
    return common.variant(config, argument, image_size=32, num_classes=10)
