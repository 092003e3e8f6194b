"""SKD-BNN, three-layer MLP on MNIST.

Published: 98.78 (no log); the paper names 2,048 units and the squared hinge, the release 6,144 and cross-entropy: see
the preset. Run: python launch.py --config=configs/skd_mnist_mlp.py --config.data.data_dir=DIR Length: 100 epochs of
235 steps.
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "skd_mnist_mlp"
    config.method = "skd"
    config.network = "hardtanh_mlp"
    config.seed = 1
    config.data.name = "mnist"
    config.data.augment = "none"
    config.data.normalize = False
    config.train.batch_size = 256
    config.train.weight_decay = 0.0
    config.skd = common.skd()
    config.skd.epochs = (100,)
    config.skd.learning_rates = (0.01,)
    config.skd.warmup_epochs = (0,)
    config.skd.final_learning_rate = 1e-5
    config.skd.optimizer = "adam"
    if argument in common.SMOKE:
        config.skd.epochs = (2,)
        config.skd.hidden = 64
    return common.variant(config, argument, image_size=28, num_classes=10)
