"""Check of SNN's published sizes and costs: stored bits of the weights and bit operations."""

import functools
from collections.abc import Iterable

import numpy as np

from bnn_jax import networks
from bnn_jax.quantizers import build_weight
from bnn_jax.report.costs import LayerComplexity, complexity
from bnn_jax.stages import QuantSpec, spec
from tests.golden.comparison import Comparison, GoldenFile

# Our networks of these names, with side of the images and classes.
NETWORK_OF = {
    "resnet18_imagenet": ("reactnet18", 224, 1000),
    "resnet34_imagenet": ("reactnet34", 224, 1000),
    "resnet18_cifar": ("reactnet18_cifar", 32, 10),
    "resnet20_cifar": ("reactnet20", 32, 10),
    "vggsmall_cifar": ("hardtanh_vgg_small", 32, 10),
}


@functools.cache
def quantized_layers(name: str, tau: int) -> tuple[LayerComplexity, ...]:
    """The quantized layers of a network of ours with binary activations, in the order of the calls."""
    network_name, side, num_classes = NETWORK_OF[name]
    quant = QuantSpec(weight=spec("codebook", tau=tau), act=spec("sign"))
    network = networks.build(spec(network_name), quant, num_classes=num_classes)
    return tuple(layer for layer in complexity(network, (side, side, 3)).layers if layer.quantized)


def costs_of_rows(rows: Iterable[np.ndarray], tau: int) -> list[float]:
    """Index bits, bits with codebooks and bit operations of layers (input channels, output channels, side)."""
    quantizer = build_weight(spec("codebook", tau=tau))(parent=None)
    costs = np.zeros(3)
    for num_in, num_out, side in rows:
        shape = (3, 3, int(num_in), int(num_out))
        cost = quantizer.cost(shape)
        index_bits = cost.stored_bits * np.prod(shape)
        operations = side**2 * cost.multiply_accumulates * cost.operation_bits
        costs += index_bits, index_bits + cost.codebook_bits, operations
    # Products with tau / 9 are a last bit of float64 away from a whole number.
    return list(np.round(costs, 6))


def check_accounting(file: GoldenFile, result: Comparison) -> None:
    """Whole networks, and the same sums over the layers as the file lists them: all exact."""
    for match in file.cases(r"(.+)\.tau(\d+)"):
        name, tau = match[1], int(match[2])
        rows = file[f"{name}.layers"]
        expected = file[match.group()]
        result.exact(f"{match.group()} of the listed layers", costs_of_rows(rows, tau), expected)
        if name not in NETWORK_OF:
            result.notes.append(f"{name} is no network of ours")
            continue
        layers = quantized_layers(name, tau)
        shapes = [(*layer.kernel_shape[2:], layer.output_shape[0]) for layer in layers if layer.kernel_shape]
        result.exact(f"{name}.layers", shapes, rows)
        index_bits = sum(layer.quantized_bits for layer in layers)
        own = (index_bits, index_bits + sum(layer.codebook_bits for layer in layers))
        result.exact(match.group(), (*own, sum(layer.bit_operations for layer in layers)), expected)


ACCOUNTING = {"accounting": check_accounting}
