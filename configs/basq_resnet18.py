"""BASQ, ResNet-18 on ImageNet: supernet, evolution on ten folds, fine-tuning of each winner; 2, 3 or 4 bits.

Published (mean over ten winners): 2 bit 68.60, 3 bit 71.40, 4 bit 72.56. The authors released MobileNet-v2 only:
this network, and that the recipe is MobileNet-v2's, are by analogy (bnn_jax/networks/searched.py).
Run: python launch.py --config=configs/basq_resnet18.py --config.basq.teacher=file:resnet50-0676ba61.pth
    --config.data.data_dir=DIR     (ImageNet in TFDS's format; `:smoke` and `:smoke_real` train a teacher of their own)
Length: as basq_mobilenet_v2.
"""

from configs import basq_mobilenet_v2, common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = basq_mobilenet_v2.get_config()
    config.name = "basq_resnet18"
    config.network = "basq_resnet18"
    return common.basq_variant(config, argument, image_size=224, num_classes=1000)
