"""Table of the networks, and the one function that builds them from a ``Spec``."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from bnn_jax.layers.conv import QuantConv, QuantDense, fan_in_uniform
from bnn_jax.networks.base import Layers, NetworkOutput, he_fan_in_normal, he_fan_out_normal, uniform_hundredth
from bnn_jax.networks.blocks import BLOCKS
from bnn_jax.networks.hard_tanh import HardTanhMlp, HardTanhResNet, HardTanhVgg
from bnn_jax.networks.reactnet import ReActNet
from bnn_jax.networks.resnet import CifarResNet, ImageNetResNet
from bnn_jax.networks.searched import SEARCHED_NETWORKS
from bnn_jax.networks.standard import StandardResNet, StandardVgg
from bnn_jax.networks.vgg_small import VggSmall
from bnn_jax.quantizers import ActQuantizer, build_act, build_weight, declared_knobs
from bnn_jax.stages import IDENTITY, QuantSpec, Spec


def _cifar_resnet(blocks_per_stage: int) -> Callable[..., nn.Module]:
    """CIFAR ResNet of depth 6b + 2."""
    return functools.partial(CifarResNet, stage_sizes=(blocks_per_stage,) * 3, widths=(16, 32, 64))


def _standard_imagenet_resnet(stage_sizes: tuple[int, ...], **options: Any) -> Callable[..., nn.Module]:
    """Post-activation ResNet for 224x224 images."""
    widths = (64, 128, 256, 512)
    return functools.partial(StandardResNet, stage_sizes=stage_sizes, widths=widths, imagenet_stem=True, **options)


def _reactnet(stage_sizes: tuple[int, ...], **options: Any) -> Callable[..., nn.Module]:
    """ReActNet-style network with the widths of ResNet-18."""
    return functools.partial(ReActNet, stage_sizes=stage_sizes, **{"widths": (64, 128, 256, 512), **options})


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
    "hardtanh_resnet20": functools.partial(
        HardTanhResNet, stage_sizes=(3, 3, 3), widths=(16, 32, 64), block="double_skip_padded"
    ),
    "hardtanh_resnet18_cifar": functools.partial(
        HardTanhResNet, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512), block="single_skip"
    ),
    "hardtanh_resnet18": functools.partial(
        HardTanhResNet, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512), imagenet_stem=True
    ),
    "hardtanh_vgg_small": HardTanhVgg,
    "hardtanh_mlp": HardTanhMlp,
    "standard_resnet20": functools.partial(
        StandardResNet, stage_sizes=(3, 3, 3), widths=(16, 32, 64), block="post_activation_padded"
    ),
    "standard_resnet18_cifar": functools.partial(StandardResNet, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512)),
    "standard_resnet18": _standard_imagenet_resnet((2, 2, 2, 2)),
    "standard_resnet34": _standard_imagenet_resnet((3, 4, 6, 3)),
    "standard_resnet50": _standard_imagenet_resnet((3, 4, 6, 3), block="bottleneck"),
    "standard_vgg_small": StandardVgg,
    "reactnet18": _reactnet((4, 4, 4, 4), imagenet_stem=True),
    "reactnet34": _reactnet((6, 8, 12, 6), imagenet_stem=True),
    "reactnet18_cifar": _reactnet((4, 4, 4, 4)),
    "reactnet20": _reactnet((6, 6, 6), widths=(16, 32, 64)),
    "reactnet8": _reactnet((2, 2, 2), widths=(16, 32, 64)),
    **SEARCHED_NETWORKS,
}

KERNEL_INITS: dict[str, Callable[..., Any]] = {
    "uniform": fan_in_uniform,
    "he_normal": he_fan_out_normal,
    "he_fan_in_normal": he_fan_in_normal,
    "uniform_hundredth": uniform_hundredth,
}

# Initialiser of all convolutions where no option says otherwise, of the networks that were published with one.
CONVOLUTION_INITS: dict[str, str] = {
    "standard_resnet20": "he_fan_in_normal",
    "standard_resnet18_cifar": "he_fan_in_normal",
    "standard_resnet18": "he_normal",
    "standard_resnet34": "he_normal",
    "standard_resnet50": "he_normal",
    "standard_vgg_small": "he_normal",
    "reactnet18": "uniform",
    "reactnet34": "uniform",
    "reactnet18_cifar": "uniform",
    "reactnet20": "uniform",
    "reactnet8": "uniform",
}


def build(
    spec: Spec, quant: QuantSpec, *, num_classes: int, compute_dtype: str = "float32", remat: bool = False
) -> Any:
    """Builds the network a ``Spec`` names.

    Args:
      spec: name in ``NETWORKS`` and the network's options; ``kernel_init`` is the initialiser of the quantized layers,
        ``full_precision_init`` that of the first convolution and the shortcuts where these are not quantized; both are
        keys of ``KERNEL_INITS``. Their defaults are 'uniform' and 'he_normal', or those of ``CONVOLUTION_INITS``.
      quant: quantizers.
      num_classes: outputs K.
      compute_dtype: 'float32' or 'bfloat16'.
      remat: whether the backward pass computes the inside of every block a second time instead of keeping it.

    Returns:
      A Linen module: (images (N, H, W, 3), QuantContext) -> NetworkOutput.

    Raises:
      ValueError: an unknown name or option.
    """
    if spec.name not in NETWORKS:
        raise ValueError(f"network {spec.name!r}: accepted are {', '.join(NETWORKS)}")
    options = spec.kwargs
    published = CONVOLUTION_INITS.get(spec.name)
    published = (published, published)
    if spec.name in SEARCHED_NETWORKS:
        # BASQ's quantized layers start small, its first convolution as PyTorch's do.
        published = ("uniform_hundredth", "uniform")
    inner_init = _kernel_init(options, "kernel_init", default=published[0] or "uniform")
    outer_init = _kernel_init(options, "full_precision_init", default=published[1] or "he_normal")
    if options.get("block", "release") not in BLOCKS:
        raise ValueError(f"block {options['block']!r}: accepted are {', '.join(BLOCKS)}")
    layers = build_layers(quant, inner_init=inner_init, outer_init=outer_init, compute_dtype=compute_dtype)
    layers = dataclasses.replace(layers, remat=remat)
    known = inspect.signature(NETWORKS[spec.name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"network {spec.name!r} has no option {option!r}")
    network = NETWORKS[spec.name](layers=layers, num_classes=num_classes, **options)
    if remat and not getattr(network, "has_blocks", False):
        raise ValueError(f"remat with network {spec.name!r}: accepted with networks that are made of blocks")
    return network


def build_layers(
    quant: QuantSpec,
    *,
    inner_init: Callable[..., Any] = fan_in_uniform,
    outer_init: Callable[..., Any] = fan_in_uniform,
    compute_dtype: str = "float32",
) -> Layers:
    """The layer factories of a network.

    Args:
      quant: quantizers.
      inner_init: initialiser of the quantized layers' kernels.
      outer_init: initialiser of the first convolution and the shortcuts where these are not quantized.
      compute_dtype: 'float32' or 'bfloat16'.
    """
    act = build_act(quant.act)
    conv = functools.partial(QuantConv, compute_dtype=compute_dtype)
    weight = build_weight(quant.weight)
    return Layers(
        conv=functools.partial(conv, weight_quantizer=weight, act_quantizer=act, kernel_init=inner_init),
        first_conv=functools.partial(
            conv,
            weight_quantizer=build_weight(quant.first),
            kernel_init=outer_init if quant.first == IDENTITY else inner_init,
        ),
        shortcut_conv=functools.partial(conv, weight_quantizer=build_weight(quant.shortcut), kernel_init=outer_init),
        dense=functools.partial(QuantDense, weight_quantizer=build_weight(quant.last), **_last_bias(quant.last)),
        inner_dense=functools.partial(QuantDense, weight_quantizer=weight, act_quantizer=act, kernel_init=inner_init),
        act=act,
        searched_act=functools.partial(_searched_act, quant.searched),
        knobs=declared_knobs(quant),
    )


def _searched_act(searched: Spec, index: int, branches: int) -> Callable[..., ActQuantizer]:
    if searched == IDENTITY:
        return build_act(IDENTITY)
    return functools.partial(build_act(searched), index=index, branches=branches)


def _last_bias(quantizer: Spec) -> dict[str, Any]:
    """Weight search starts the bias of a searched classifier at 0; other classifiers have the network's own start."""
    return {"bias_init": nn.initializers.zeros} if quantizer.name == "categorical" else {}


def _kernel_init(options: dict[str, Any], key: str, *, default: str) -> Callable[..., Any]:
    name = options.pop(key, default)
    if name not in KERNEL_INITS:
        raise ValueError(f"{key} {name!r}: accepted are {', '.join(KERNEL_INITS)}")
    return KERNEL_INITS[name]


__all__ = ["NETWORKS", "Layers", "NetworkOutput", "build", "build_layers"]
