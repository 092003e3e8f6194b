"""ReCU, VGG-Small on CIFAR-10.

Published: 92.2 (arXiv 2103.12369).
Run: python launch.py --config=configs/recu_vgg_small.py --config.data.data_dir=DIR
Length: 600 epochs of 196 steps.
"""

from configs import common, recu_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = recu_resnet20.get_config()
    config.name = "recu_vgg_small"
    config.network = "hardtanh_vgg_small"
    config.recu.init = "he_normal"
    if argument in common.SMOKE:
        config.recu.epochs = 2
        config.recu.warmup_epochs = 1
    return common.variant(config, argument, image_size=32, num_classes=10)
