"""Weight Search, VGG-Small on CIFAR-10: weights of a list of values, activations in full precision.

Published (best epoch on the test set; last epoch in brackets): full precision 93.87 (93.80), 1b 93.91 (93.79), po2-2b
93.83 (93.81), po2-3b 93.68 (93.60). Run: python launch.py --config=configs/weight_search_vgg_small.py
--config.weight_search.values=1b --config.data.data_dir=DIR Length: 200 epochs of 500 steps.
"""

from configs import common, weight_search_resnet20


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = weight_search_resnet20.get_config()
    config.name = "weight_search_vgg_small"
    config.network = "standard_vgg_small"
    config.train.batch_size = 100
    config.train.weight_decay = 5e-4
    config.weight_search.learning_rate = 0.02
    if argument in common.SMOKE:
        config.weight_search.epochs = (2,)
    return common.variant(config, argument, image_size=32, num_classes=10)
