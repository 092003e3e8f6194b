"""BASQ, MobileNet-v2 on ImageNet: supernet, evolution on ten folds, fine-tuning of each winner; 2, 3 or 4 bits.

Published (mean over ten winners, each on its own 45,000 validation images): 2 bit 64.71, 4 bit 71.98; full precision
71.88. Before fine-tuning the 2-bit winners have 59.55. Released is the 2-bit code; other bits: `--config.basq.bits=`.
Run: python launch.py --config=configs/basq_mobilenet_v2.py --config.basq.teacher=file:resnet50-0676ba61.pth
    --config.data.data_dir=DIR     (ImageNet in TFDS's format; `:smoke` and `:smoke_real` train a teacher of their own)
Length: two phases of 280 epochs of 1,669 steps, 9,450 evaluations of 5,000 images, ten times 3 epochs.
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "basq_mobilenet_v2"
    config.method = "basq"
    config.network = "basq_mobilenet_v2"
    common.imagenet(config)
    config.train.batch_size = 768
    config.basq = common.basq()
    config.basq.schedule_steps = 466_000  # the release trains a little longer
    config.basq.teacher = "file:resnet50-0676ba61.pth"  # the name PyTorch's standard weights have
    config.basq.teacher_network = "standard_resnet50"
    return common.basq_variant(config, argument, image_size=224, num_classes=1000)
