"""SKD-BNN, ResNet-18 on ImageNet: two stages, the second from the weights of the first with a small learning rate.

Published (best epoch on 49,920 validation images): stage 1 59.499, stage 2 59.712.
Run: python launch.py --config=configs/skd_resnet18_imagenet.py:smoke     (generated images; the ImageNet input comes
later) Length: 128 + 128 epochs of 5,004 steps.
"""

from configs import common, skd_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke'."""
    config = skd_resnet20.get_config()
    config.name = "skd_resnet18_imagenet"
    config.network = "hardtanh_resnet18"
    config.data.name = "imagenet2012"
    config.data.augment = "pad_crop_flip"
    config.train.batch_size = 256
    config.train.weight_decay = 1e-5
    config.skd.epochs = (128, 128)
    config.skd.learning_rates = (0.1, 0.001)
    config.skd.warmup_epochs = (8, 0)
    if argument == "smoke":
        config.skd.epochs = (1, 1)
        config.skd.warmup_epochs = (0, 0)
    return common.variant(config, argument, image_size=224, num_classes=1000)
