"""SKD-BNN, ResNet-18 on ImageNet: two stages, the second from the weights of the first with a small learning rate.

Published (best epoch on 49,920 validation images): stage 1 59.499, stage 2 59.712.
Run: python launch.py --config=configs/skd_resnet18_imagenet.py --config.data.data_dir=DIR     (TFDS's format)
Length: 128 + 128 epochs of 5,004 steps.
"""

from configs import common, skd_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = skd_resnet20.get_config()
    config.name = "skd_resnet18_imagenet"
    config.network = "hardtanh_resnet18"
    common.imagenet(config)
    config.data.lighting = "release"
    config.train.batch_size = 256
    config.train.weight_decay = 1e-5
    config.skd.epochs = (128, 128)
    config.skd.learning_rates = (0.1, 0.001)
    config.skd.warmup_epochs = (8, 0)
    if argument in common.SMOKE:
        config.skd.epochs = (1, 1)
        config.skd.warmup_epochs = (0, 0)
    return common.variant(config, argument, image_size=224, num_classes=1000)
