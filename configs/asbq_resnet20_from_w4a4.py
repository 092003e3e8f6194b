"""ASBQ, ResNet-20 on CIFAR-10: the end of the chain, 4 -> 2 -> 1 bit, from the authors' own 4-bit network.

The released checkpoint (best epoch on the test set: 91.99; the file gives 91.77) takes the place of the first three
rungs. Published for the 1-bit rung, preset 'checkpoint': 88.54 (best epoch; last epoch 88.07).
Run: python launch.py --config=configs/asbq_resnet20_from_w4a4.py --config.data.data_dir=DIR
    --config.asbq.init_from=file:asbq_resnet20_cifar10_w4a4.pth.tar
Length: 240 epochs of 391 steps per rung as published; --config.asbq.epochs='(20, 40)' scales the schedule.
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "asbq_resnet20_from_w4a4"
    config.asbq = common.asbq()
    config.asbq.preset = "checkpoint"
    config.asbq.bits = (2, 1)
    config.asbq.learning_rates = (0.01,)
    config.asbq.init_from = "file:asbq_resnet20_cifar10_w4a4.pth.tar"
    config.asbq.init_bits = 4
    config.asbq.schedule_epochs = 240
    if argument in common.SMOKE:
        config.asbq.epochs = (1,)
        config.asbq.init_from = None
    return common.variant(config, argument, image_size=32, num_classes=10)
