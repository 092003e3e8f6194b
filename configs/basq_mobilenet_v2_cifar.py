"""BASQ, MobileNet-v2 on CIFAR-10: supernet, evolution on ten folds, fine-tuning of each winner; 2, 3 or 4 bits.

Published (secondary source, presumably 2 bit): 89.62 without BASQ, 90.94 with it. The authors released no CIFAR code:
the network for 32x32 images, the recipe's length and the teacher are by analogy (bnn_jax/networks/searched.py). The
search looks at 5,000 images held out from training, never at the test images: `--config.basq.preset=release` does.
Run: python launch.py --config=configs/basq_mobilenet_v2_cifar.py --config.data.data_dir=DIR
Length: teacher 200 epochs, two phases of 100 epochs of 352 steps, 9,450 evaluations of 500 images, ten times 3 epochs.
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "basq_mobilenet_v2_cifar"
    config.method = "basq"
    config.network = "basq_mobilenet_v2_cifar"
    config.data.validation_fraction = 0.1
    config.train.weight_decay = 5e-4  # of the teacher
    config.basq = common.basq()
    config.basq.preset = "held_out"
    config.basq.epochs = (100,)
    return common.basq_variant(config, argument, image_size=32, num_classes=10)
