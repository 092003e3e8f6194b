"""Table of the networks, and the one function that builds them from a ``Spec``."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from bnn_jax.catalogue import blocks_of_depth, facts_of, name_of_depth
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

CIFAR_WIDTHS, WIDTHS = (16, 32, 64), (64, 128, 256, 512)

# The networks for CIFAR with three stages of n blocks, depth 6n + 2; one of ReActNet's blocks has one convolution only.
_DEPTH_FAMILIES: dict[str, Callable[[int], Callable[..., Any]]] = {
    "resnet": lambda n: functools.partial(CifarResNet, stage_sizes=(n,) * 3, widths=CIFAR_WIDTHS),
    "hardtanh_resnet": lambda n: functools.partial(
        HardTanhResNet, stage_sizes=(n,) * 3, widths=CIFAR_WIDTHS, block="double_skip_padded"
    ),
    "standard_resnet": lambda n: functools.partial(
        StandardResNet, stage_sizes=(n,) * 3, widths=CIFAR_WIDTHS, block="post_activation_padded"
    ),
    "standard_resnet_projection": lambda n: functools.partial(
        StandardResNet, stage_sizes=(n,) * 3, widths=CIFAR_WIDTHS
    ),
    "reactnet": lambda n: functools.partial(ReActNet, stage_sizes=(2 * n,) * 3, widths=CIFAR_WIDTHS),
}


class _Networks(dict[str, Callable[..., Any]]):
    """The networks by name; of the families for CIFAR it holds every depth 6n + 2 ('standard_resnet32')."""

    def __missing__(self, name: str) -> Callable[..., Any]:
        found = blocks_of_depth(name)
        if found is None:
            raise KeyError(name)
        return _DEPTH_FAMILIES[found[0]](found[1])

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and blocks_of_depth(name) is not None)


def _named(prefix: str, make: Callable[..., Any], sizes: dict[str, tuple[int, ...]], **options: Any) -> dict[str, Any]:
    """Networks of one kind with the widths of ResNet-18, by the end of their names."""
    return {
        f"{prefix}{end}": functools.partial(make, stage_sizes=stage_sizes, widths=WIDTHS, **options)
        for end, stage_sizes in sizes.items()
    }


_CIFAR_18, _18_AND_34 = {"18_cifar": (2, 2, 2, 2)}, {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3)}

NETWORKS: dict[str, Callable[..., Any]] = _Networks(
    {
        **{f"resnet{6 * n + 2}": _DEPTH_FAMILIES["resnet"](n) for n in (1, 2, 3, 4, 9, 18)},
        **_named("resnet", CifarResNet, _CIFAR_18),
        **_named("resnet", ImageNetResNet, _18_AND_34, block="imagenet"),
        "vgg_small": VggSmall,
        "hardtanh_resnet20": _DEPTH_FAMILIES["hardtanh_resnet"](3),
        **_named("hardtanh_resnet", HardTanhResNet, _CIFAR_18, block="single_skip"),
        **_named("hardtanh_resnet", HardTanhResNet, {"18": (2, 2, 2, 2)}, imagenet_stem=True),
        "hardtanh_vgg_small": HardTanhVgg,
        "hardtanh_mlp": HardTanhMlp,
        "standard_resnet20": _DEPTH_FAMILIES["standard_resnet"](3),
        **_named("standard_resnet", StandardResNet, _CIFAR_18),
        **_named("standard_resnet", StandardResNet, _18_AND_34, imagenet_stem=True),
        **_named("standard_resnet", StandardResNet, {"50": (3, 4, 6, 3)}, imagenet_stem=True, block="bottleneck"),
        "standard_vgg_small": StandardVgg,
        **_named("reactnet", ReActNet, {"18": (4, 4, 4, 4), "34": (6, 8, 12, 6)}, imagenet_stem=True),
        **_named("reactnet", ReActNet, {"18_cifar": (4, 4, 4, 4)}),
        **{f"reactnet{6 * n + 2}": _DEPTH_FAMILIES["reactnet"](n) for n in (3, 1)},
        **SEARCHED_NETWORKS,
    }
)


def known_networks(blocks: int = 0) -> dict[str, Callable[..., Any]]:
    """The networks by name, among those of the families for CIFAR all that have so many blocks in each stage."""
    sizes = {n for n in (blocks, blocks // 2) if n}
    members = {name_of_depth(family, n): make(n) for family, make in _DEPTH_FAMILIES.items() for n in sizes}
    return {**members, **NETWORKS}


KERNEL_INITS: dict[str, Callable[..., Any]] = {
    "uniform": fan_in_uniform,
    "he_normal": he_fan_out_normal,
    "he_fan_in_normal": he_fan_in_normal,
    "uniform_hundredth": uniform_hundredth,
}


def build(
    spec: Spec,
    quant: QuantSpec,
    *,
    num_classes: int,
    compute_dtype: str = "float32",
    remat: bool = False,
    cpu_kernels: str = "auto",
) -> Any:
    """Builds the network a ``Spec`` names.

    Args:
      spec: name in ``NETWORKS`` and the network's options; ``kernel_init`` is the initialiser of the quantized layers,
        ``full_precision_init`` that of the first convolution and the shortcuts where these are not quantized; both are
        keys of ``KERNEL_INITS``. Their defaults are the network's own, in ``bnn_jax.catalogue``.
      quant: quantizers.
      num_classes: outputs K.
      compute_dtype: 'float32' or 'bfloat16'.
      remat: whether the backward pass computes the inside of every block a second time instead of keeping it.
      cpu_kernels: 'auto' or 'xla', see ``QuantConv``.

    Returns:
      A Linen module: (images (N, H, W, 3), QuantContext) -> NetworkOutput.

    Raises:
      ValueError: an unknown name or option.
    """
    if spec.name not in NETWORKS:
        raise ValueError(f"network {spec.name!r}: accepted are {', '.join(NETWORKS)}")
    options = spec.kwargs
    inner, outer = facts_of(spec.name).inits
    inner_init = _kernel_init(options, "kernel_init", default=inner)
    outer_init = _kernel_init(options, "full_precision_init", default=outer)
    if options.get("block", "release") not in BLOCKS:
        raise ValueError(f"block {options['block']!r}: accepted are {', '.join(BLOCKS)}")
    execution = {"compute_dtype": compute_dtype, "cpu_kernels": cpu_kernels}
    layers = build_layers(quant, inner_init=inner_init, outer_init=outer_init, **execution)
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
    cpu_kernels: str = "auto",
) -> Layers:
    """The layer factories of a network.

    Args:
      quant: quantizers.
      inner_init: initialiser of the quantized layers' kernels.
      outer_init: initialiser of the first convolution and the shortcuts where these are not quantized.
      compute_dtype: 'float32' or 'bfloat16'.
      cpu_kernels: 'auto' or 'xla', see ``QuantConv``.
    """
    act = build_act(quant.act)
    conv = functools.partial(QuantConv, compute_dtype=compute_dtype, cpu_kernels=cpu_kernels)
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
