"""Weight Search with the binary activations of IR-Net, ResNet-20 on CIFAR-10: 1-bit weights and activations.

Published: nothing; the combination is ours. To compare with: configs/irnet_resnet20.py, the same network and
activations with IR-Net's binary weights.
Run: python launch.py --config=configs/weight_search_w1a1_resnet20.py --config.data.data_dir=DIR
Length: 200 epochs of 391 steps.
"""

from configs import common, weight_search_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = weight_search_resnet20.get_config()
    config.name = "weight_search_w1a1_resnet20"
    config.network = "hardtanh_resnet20"
    config.weight_search.values = "1b"
    config.weight_search.activations = "irnet"
    if argument in common.SMOKE:
        config.weight_search.epochs = (2,)
    return common.variant(config, argument, image_size=32, num_classes=10)
