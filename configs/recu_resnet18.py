"""ReCU, ResNet-18 on CIFAR-10.

Published: 92.8 (arXiv 2103.12369; the network there has other shortcuts, see bnn_jax/methods/recu.py).
Run: python launch.py --config=configs/recu_resnet18.py --config.data.data_dir=DIR
Length: 600 epochs of 196 steps.
"""

from configs import common, recu_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = recu_resnet20.get_config()
    config.name = "recu_resnet18"
    config.network = "hardtanh_resnet18_cifar"
    config.recu.init = "uniform"
    if argument in common.SMOKE:
        config.recu.epochs = 2
        config.recu.warmup_epochs = 1
    return common.variant(config, argument, image_size=32, num_classes=10)
