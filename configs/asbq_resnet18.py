"""ASBQ, ResNet-18 on ImageNet: four rungs 32 -> 8 -> 4 -> 1 (published file names show 32 -> 8 -> 1 and no 2-bit rung).

Published (text only): 1 bit "better than SKD-BNN" (59.7); the tables are images that could not be read.
Run: python launch.py --config=configs/asbq_resnet18.py --config.data.data_dir=DIR     (ImageNet in TFDS's format)
Length: 100/60/60/100 epochs.
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "asbq_resnet18"
    config.network = "resnet18"
    common.imagenet(config)
    config.train.batch_size = 256
    config.asbq = common.asbq()
    config.asbq.bits = (32, 8, 4, 1)
    config.asbq.epochs = (100, 60, 60, 100)
    config.asbq.learning_rates = (0.1, 0.01, 0.01, 0.01)
    config.asbq.learning_rate_boundaries = (30.0, 60.0, 90.0)
    if argument in common.SMOKE:
        config.asbq.epochs = (1,)
    return common.variant(config, argument, image_size=224, num_classes=1000)
