"""Weight Search, ResNet-18 on ImageNet; the 1x1 convolutions of the shortcuts are searched too.

Published: the recipe, and no number to compare with. Also for network standard_resnet34 and standard_resnet50.
Run: python launch.py --config=configs/weight_search_resnet18.py --config.data.data_dir=DIR     (TFDS's format)
Length: 120 epochs of 5,005 steps.
"""

from configs import common, weight_search_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = weight_search_resnet20.get_config()
    config.name = "weight_search_resnet18"
    config.network = "standard_resnet18"
    common.imagenet(config)
    config.train.batch_size = 256
    config.weight_search.epochs = (120,)
    config.weight_search.temperature_rate = 0.95
    if argument in common.SMOKE:
        config.weight_search.epochs = (1,)
    return common.variant(config, argument, image_size=224, num_classes=1000)
