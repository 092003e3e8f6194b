"""SKD-BNN, ResNet-20 on CIFAR-10, binary weights and activations, from scratch in one stage.

Published (code Wzixin/SKD-BNN, best epoch on the first 9,984 test images): 87.149, printed as 87.2; last ten epochs
86.69. Run: python launch.py --config=configs/skd_resnet20.py --config.data.data_dir=DIR Length: 700 epochs of 390
steps.
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "skd_resnet20"
    config.method = "skd"
    config.network = "hardtanh_resnet20"
    config.data.augment = "edge_crop_flip"
    config.train.nesterov = False
    config.train.drop_last_batch = True
    config.skd = common.skd()
    if argument in common.SMOKE:
        config.skd.epochs = (2,)
        config.skd.warmup_epochs = (1,)
    return common.variant(config, argument, image_size=32, num_classes=10)
