"""ReCU, ResNet-20 on CIFAR-10: binary weights and activations in one stage, without a teacher.

Published: 87.4 (arXiv 2103.12369; the network there has other shortcuts, see bnn_jax/methods/recu.py).
Run: python launch.py --config=configs/recu_resnet20.py --config.data.data_dir=DIR
Length: 600 epochs of 196 steps.
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "recu_resnet20"
    config.method = "recu"
    config.network = "hardtanh_resnet20"
    config.train.batch_size = 256
    config.train.nesterov = False
    config.train.weight_decay = 5e-4
    config.recu = common.defaults("recu")
    if argument in common.SMOKE:
        config.recu.epochs = 2
        config.recu.warmup_epochs = 1
    return common.variant(config, argument, image_size=32, num_classes=10)
