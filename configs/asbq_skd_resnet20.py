"""ASBQ chain whose last rung is also taught by itself: the objectives of SKD-BNN added to the 1-bit rung.

Published: nothing; the combination is ours.
Run: python launch.py --config=configs/asbq_skd_resnet20.py --config.data.data_dir=DIR
Length: as asbq_resnet20.
"""

from configs import asbq_resnet20, common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = asbq_resnet20.get_config()
    config.name = "asbq_skd_resnet20"
    config.extra_objectives = ("feature_swap", "label_bank", "cluster")
    if argument in common.SMOKE:
        config.asbq.epochs = (1,)
    return common.variant(config, argument, image_size=32, num_classes=10)
