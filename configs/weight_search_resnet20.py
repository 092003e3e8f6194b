"""Weight Search, ResNet-20 on CIFAR-10: weights of a list of values, activations in full precision.

Published (best epoch on the test set; last epoch in brackets): full precision 91.77 (91.65), 1b 90.70 (90.69), po2-2b
91.52 (91.39), po2-3b 91.71 (91.60). Run: python launch.py --config=configs/weight_search_resnet20.py
--config.weight_search.values=po2-2b --config.data.data_dir=DIR Values: a name, fp32, or any list: =(-1.0,0.0,1.0).
Length: 200 epochs of 391 steps.
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "weight_search_resnet20"
    config.method = "weight_search"
    config.network = "standard_resnet20"
    config.train.nesterov = False
    config.weight_search = common.weight_search()
    if argument in common.SMOKE:
        config.weight_search.epochs = (2,)
    return common.variant(config, argument, image_size=32, num_classes=10)
