"""SNN, ReActNet-style ResNet-18 on ImageNet: binary activations, then tau/9 bits per weight, taught by a ResNet-34.

Published (code yikaiw/SNN, best epoch on the validation images; stored Mbit and G bit operations of the binary layers):
  tau 9  65.7   10.99  1.677
  tau 6  63.4   7.324  0.883
  tau 5  62.1   6.103  0.501
  tau 4  60.7   4.882  0.297
The released command uses four GPUs and so never refines its codebooks: `--config.snn.preset=release_4gpu`.
Run: python launch.py --config=configs/snn_resnet18.py --config.snn.tau=5 --config.snn.teacher=file:resnet34.pth
    --config.data.data_dir=DIR     (ImageNet in TFDS's format; `:smoke` and `:smoke_real` train a teacher of their own)
Length: 256 + 256 epochs of 2,503 steps.
"""

from configs import common


def get_config(argument: str = ""):
    """The config; ``argument`` may be 'smoke' or 'smoke_real'."""
    config = common.base()
    config.name = "snn_resnet18"
    config.method = "snn"
    config.network = "reactnet18"
    common.imagenet(config)
    config.data.lighting = "release"
    config.train.batch_size = 512
    config.snn = common.snn()
    config.snn.teacher = "file:resnet34-b627a593.pth"  # the name PyTorch's standard weights have
    config.snn.teacher_network = "standard_resnet34"
    return common.snn_variant(config, argument, image_size=224, num_classes=1000)
