"""SNN whose last step is also taught by itself: the objectives of SKD-BNN added to the step of sub-bit weights.

Published: nothing; the combination is ours.
Run: python launch.py --config=configs/snn_skd_resnet20.py --config.data.data_dir=DIR --config.snn.tau=5
Length: as snn_resnet20.
"""

from configs import common, snn_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = snn_resnet20.get_config()
    config.name = "snn_skd_resnet20"
    config.extra_objectives = ("feature_swap", "label_bank", "cluster")
    return common.snn_variant(config, argument, image_size=32, num_classes=10)
