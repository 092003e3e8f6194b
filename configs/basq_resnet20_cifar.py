"""BASQ, ResNet-20 on CIFAR-10: supernet, evolution on ten folds, fine-tuning of each winner; 2, 3 or 4 bits.

Published (secondary source, presumably 2 bit): 89.40 without BASQ, 90.21 with its activations, 89.72 with its block.
The authors released neither ResNet nor CIFAR code: network, recipe and teacher are by analogy
(bnn_jax/networks/searched.py). The search looks at images held out from training.
Run: python launch.py --config=configs/basq_resnet20_cifar.py --config.data.data_dir=DIR
Length: as basq_mobilenet_v2_cifar.
"""

from configs import basq_mobilenet_v2_cifar, common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = basq_mobilenet_v2_cifar.get_config()
    config.name = "basq_resnet20_cifar"
    config.network = "basq_resnet20_cifar"
    return common.basq_variant(config, argument, image_size=32, num_classes=10)
