"""The networks as plain data: what methods have to know of one without building it. Nothing here imports jax."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a network.

    Attributes:
      inits: initialisers of its quantized layers, and of its first convolution and shortcuts where these are not
        quantized; keys of ``bnn_jax.networks.KERNEL_INITS``.
      released_init: initialiser of all convolutions in the programs of IR-Net's networks, or None.
      first_layer: name of the layer that reads the image.
      last_layer: name of the classifier.
      asbq_blocks: those of ASBQ's blocks it can be built of; () for other networks.
      quantized_first: whether ASBQ quantizes its first convolution too, and masks blocks of weights, not filters.
      behind_relu: whether quantized layers read what a ReLU leaves, so that no input is negative.
      searched: whether it is a supernet of BASQ's.
      dense: whether it has dense layers only; the first one is then quantized too.
      least_side: images of so many pixels per side, or more, are accepted.
    """

    inits: tuple[str, str] = ("uniform", "he_normal")
    released_init: str | None = None
    first_layer: str = "conv1"
    last_layer: str = "fc"
    asbq_blocks: tuple[str, ...] = ()
    quantized_first: bool = False
    behind_relu: bool = False
    searched: bool = False
    dense: bool = False
    least_side: int = 1


# Of networks whose stem and stages divide the side by 32, which leaves 2x2; of three poolings, which leave 1x1.
IMAGENET_SIDE, VGG_SIDE = 64, 8
FAN_IN, FAN_OUT = ("he_fan_in_normal", "he_fan_in_normal"), ("he_normal", "he_normal")

# By pattern of the whole name; the first that fits holds.
_FACTS: tuple[tuple[str, Facts], ...] = (
    (r"resnet(18|34)", Facts(asbq_blocks=("imagenet",), least_side=IMAGENET_SIDE)),
    (r"resnet\d+(_cifar)?", Facts(asbq_blocks=("release", "checkpoint"))),
    (r"vgg_small", Facts(first_layer="conv0", quantized_first=True, least_side=VGG_SIDE)),
    (r"hardtanh_resnet18", Facts(released_init="he_normal", least_side=IMAGENET_SIDE)),
    (r"hardtanh_resnet\d+(_cifar)?", Facts(released_init="he_fan_in_normal")),
    (r"hardtanh_vgg_small", Facts(released_init="he_normal", first_layer="conv0", least_side=VGG_SIDE)),
    (r"hardtanh_mlp", Facts(last_layer="fc4", dense=True)),
    (r"standard_resnet(18|34|50)", Facts(inits=FAN_OUT, behind_relu=True, least_side=IMAGENET_SIDE)),
    (r"standard_resnet\d+(_cifar|_projection)?", Facts(inits=FAN_IN, behind_relu=True)),
    (r"standard_vgg_small", Facts(inits=FAN_OUT, first_layer="conv0", behind_relu=True, least_side=VGG_SIDE)),
    (r"reactnet(18|34)", Facts(inits=("uniform", "uniform"), least_side=IMAGENET_SIDE)),
    (r"reactnet\d+(_cifar)?", Facts(inits=("uniform", "uniform"))),
    # The quantized layers start small, the first convolution as PyTorch's do.
    (r"basq_.*_cifar", Facts(inits=("uniform_hundredth", "uniform"), searched=True)),
    (r"basq_.*", Facts(inits=("uniform_hundredth", "uniform"), searched=True, least_side=IMAGENET_SIDE)),
)


def facts_of(network: str) -> Facts:
    """The facts of a network; the defaults for a name without any."""
    return next((facts for pattern, facts in _FACTS if re.fullmatch(pattern, network)), Facts())


def blocks_of_depth(network: str) -> tuple[str, int] | None:
    """Family and blocks per stage of a CIFAR network of depth 6n + 2: ('standard_resnet', 5) for 'standard_resnet32'.

    'standard_resnet32_projection' has a convolution on each shortcut that changes the shape ("option B"). None for
    names of another form. ImageNet's networks have names of the same form ('standard_resnet50'): they come first.
    """
    form = r"((?:hardtanh_|standard_)?resnet|reactnet)([1-9]\d{0,2})(_projection)?"
    match = re.fullmatch(form, network)
    if match is None or (int(match[2]) - 2) % 6 or int(match[2]) < 8:
        return None
    if match[3] and match[1] != "standard_resnet":
        return None
    return match[1] + (match[3] or ""), (int(match[2]) - 2) // 6


def name_of_depth(family: str, blocks: int) -> str:
    """The inverse of ``blocks_of_depth``."""
    stem = family.removesuffix("_projection")
    return f"{stem}{6 * blocks + 2}{family.removeprefix(stem)}"
