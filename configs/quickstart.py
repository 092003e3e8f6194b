"""Quickstart: the ASBQ chain with ResNet-8 on scikit-learn's 8x8 digits, enlarged to 16x16; minutes on a laptop's CPU.

The digits stand in for a data set so that nothing has to be downloaded; the accuracies compare with nothing.
Run: make run, or: python launch.py --config=configs/quickstart.py
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "quickstart"
    config.network = "resnet8"
    config.data.name = "digits"
    config.data.image_size = 16
    config.data.augment = "pad_crop"  # mirrored digits are no digits
    config.train.batch_size = 64
    config.asbq = common.asbq()
    config.asbq.epochs = (6,)
    config.asbq.learning_rates = (0.1, 0.05, 0.05, 0.02, 0.02)
    config.asbq.learning_rate_boundaries = (4.0, 5.0)
    config.asbq.learning_rate_factors = (1.0, 0.1, 0.01)
    if argument in common.SMOKE:
        config.asbq.epochs = (1,)
    return common.variant(config, argument, image_size=16, num_classes=10)
