"""ASBQ, ResNet-20 on CIFAR-10: the five-rung chain 32 -> 8 -> 4 -> 2 -> 1 bit.

Published (code Luadoo/ASBQ, best epoch on the test set): 4 bit 91.99, 1 bit 88.54 (last epoch 88.07); both from
networks that are not fully quantized, see `--config.asbq.preset`: 'checkpoint' compares with them, 'paper' is truly
1-bit in weights and activations.
Run: python launch.py --config=configs/asbq_resnet20.py --config.data.data_dir=DIR
Length: 240 epochs of 391 steps per rung (the release says 80 suffice for 32 -> 8).
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "asbq_resnet20"
    config.asbq = common.asbq()
    if argument in common.SMOKE:
        config.asbq.epochs = (1,)
    return common.variant(config, argument, image_size=32, num_classes=10)
