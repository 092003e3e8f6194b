"""Table of the networks, and the one function that builds them from a ``Spec``."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from bnn_jax.layers.conv import QuantConv, QuantDense, fan_in_uniform
from bnn_jax.networks.base import Layers, NetworkOutput, he_fan_out_normal
from bnn_jax.networks.blocks import BLOCKS
from bnn_jax.networks.resnet import CifarResNet, ImageNetResNet
from bnn_jax.networks.vgg_small import VggSmall
from bnn_jax.quantizers import build_act, build_weight
from bnn_jax.stages import QuantSpec, Spec


def _cifar_resnet(blocks_per_stage: int) -> Callable[..., nn.Module]:
    """CIFAR ResNet of depth 6b + 2."""
    return functools.partial(CifarResNet, stage_sizes=(blocks_per_stage,) * 3, widths=(16, 32, 64))


NETWORKS: dict[str, Callable[..., Any]] = {
    "resnet8": _cifar_resnet(1),
    "resnet14": _cifar_resnet(2),
    "resnet20": _cifar_resnet(3),
    "resnet26": _cifar_resnet(4),
    "resnet56": _cifar_resnet(9),
    "resnet110": _cifar_resnet(18),
    "resnet18_cifar": functools.partial(CifarResNet, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512)),
    "resnet18": functools.partial(
        ImageNetResNet, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512), block="imagenet"
    ),
    "resnet34": functools.partial(
        ImageNetResNet, stage_sizes=(3, 4, 6, 3), widths=(64, 128, 256, 512), block="imagenet"
    ),
    "vgg_small": VggSmall,
}

KERNEL_INITS: dict[str, Callable[..., Any]] = {"uniform": fan_in_uniform, "he_normal": he_fan_out_normal}


def build(spec: Spec, quant: QuantSpec, *, num_classes: int, compute_dtype: str = "float32") -> Any:
    """Builds the network a ``Spec`` names.

    Args:
      spec: name in ``NETWORKS`` and the network's options; ``kernel_init`` ('uniform' or 'he_normal') is the
        initialiser of the quantized convolutions.
      quant: quantizers.
      num_classes: outputs K.
      compute_dtype: 'float32' or 'bfloat16'.

    Returns:
      A Linen module: (images (N, H, W, 3), QuantContext) -> NetworkOutput.

    Raises:
      ValueError: an unknown name or option.
    """
    if spec.name not in NETWORKS:
        raise ValueError(f"network {spec.name!r}: accepted are {', '.join(NETWORKS)}")
    options = spec.kwargs
    kernel_init = options.pop("kernel_init", "uniform")
    if kernel_init not in KERNEL_INITS:
        raise ValueError(f"kernel_init {kernel_init!r}: accepted are {', '.join(KERNEL_INITS)}")
    if options.get("block", "release") not in BLOCKS:
        raise ValueError(f"block {options['block']!r}: accepted are {', '.join(BLOCKS)}")
    act = build_act(quant.act)
    conv = functools.partial(QuantConv, compute_dtype=compute_dtype)
    inner_init = KERNEL_INITS[kernel_init]
    layers = Layers(
        conv=functools.partial(
            conv, weight_quantizer=build_weight(quant.weight), act_quantizer=act, kernel_init=inner_init
        ),
        first_conv=functools.partial(conv, weight_quantizer=build_weight(quant.first), kernel_init=inner_init),
        shortcut_conv=functools.partial(conv, weight_quantizer=build_weight(quant.shortcut)),
        dense=functools.partial(QuantDense, weight_quantizer=build_weight(quant.last)),
        act=act,
    )
    return NETWORKS[spec.name](layers=layers, num_classes=num_classes, **options)


__all__ = ["NETWORKS", "Layers", "NetworkOutput", "build"]
