"""SKD-BNN, ResNet-18 on CIFAR-10.

Published (best epoch on the first 9,984 test images): 92.949, printed as 93.0; last ten epochs 92.77.
Run: python launch.py --config=configs/skd_resnet18.py --config.data.data_dir=DIR
Length: 800 epochs of 390 steps.
"""

from configs import common, skd_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = skd_resnet20.get_config()
    config.name = "skd_resnet18"
    config.network = "hardtanh_resnet18_cifar"
    config.train.weight_decay = 1e-5
    config.skd.epochs = (800,)
    config.skd.learning_rates = (0.3,)
    config.skd.warmup_epochs = (16,)
    if argument in common.SMOKE:
        config.skd.epochs = (2,)
        config.skd.warmup_epochs = (1,)
    return common.variant(config, argument, image_size=32, num_classes=10)
