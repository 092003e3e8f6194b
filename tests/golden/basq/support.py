"""What the BASQ checks share: PyTorch's names, networks of a file's geometry."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bnn_jax import networks
from bnn_jax.stages import QuantSpec, spec
from bnn_jax.storage import pytorch
from tests.golden.comparison import Comparison

BRANCHES = 7

# PyTorch's modules and ours, in a block. Group 1 is a branch.
MODULES = (
    (r"bn_qconv_bn_relu_0\.0", "expand/norm_in"),
    (r"bn_qconv_bn_relu_0\.1", "expand/conv/act_quantizer"),
    (r"bn_qconv_bn_relu_0\.2", "expand/conv"),
    (r"bn_qconv_bn_relu_0\.3", "expand/norm_out"),
    (r"bn0_last", "expand/norm_last"),
    (r"branch_bn_q_1\.(\d+)\.0", "depthwise/norm_in"),
    (r"branch_bn_q_1\.(\d+)\.1", "depthwise/conv/act_quantizer"),
    (r"conv1", "depthwise/conv"),
    (r"branch_bn_1\.(\d+)\.0", "depthwise/norm_out"),
    (r"bn1_last\.(\d+)", "depthwise/norm_last"),
    (r"bn_qconv_bn_relu_2\.0", "project/norm_in"),
    (r"bn_qconv_bn_relu_2\.1", "project/conv/act_quantizer"),
    (r"bn_qconv_bn_relu_2\.2", "project/conv"),
    (r"bn_qconv_bn_relu_2\.3", "project/norm_out"),
    (r"bn2_last", "project/norm_last"),
)
LEAVES = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
    "s": ("params", "step"),
    "upper_bound": ("params", "upper_bound"),
    "weights": ("params", "kernel"),
    "w_quantize.s": ("params", "weight_quantizer/step"),
}


def relative_to_largest(result: Comparison, what: str, own: ArrayLike, reference: ArrayLike, tolerance: float) -> None:
    """Compares with a tolerance relative to the largest magnitude of the reference."""
    largest = float(np.max(np.abs(reference), initial=0.0))
    result.close(what, own, reference, atol=tolerance * max(largest, 1e-12))


def place_of(name: str, *, head: int | None = None) -> tuple[str, int | None] | None:
    """Our path, and the branch or None, for a name of PyTorch's; None for the constants, which we do not store.

    Args:
      name: with 'feature.<i>.' in a network, without in a block.
      head: number of the head's feature.
    """
    if name.endswith(".bin"):
        return None
    if name.startswith("classifier.1."):
        return f"params/fc/{'kernel' if name.endswith('weight') else 'bias'}", None
    match = re.fullmatch(r"feature\.(\d+)\.(.+)", name)
    prefix, inner = ("", name) if match is None else (f"block_{match.group(1)}/", match.group(2))
    if prefix == "block_0/":
        return _stem_place(inner), None
    for module, ours in MODULES:
        found = re.fullmatch(module + r"\.(\w[\w.]*)", inner)
        if found and found.groups()[-1] in LEAVES:
            collection, leaf = LEAVES[found.groups()[-1]]
            if match is not None and int(match.group(1)) == head:
                prefix, ours = "", ours.replace("expand", "head")
            return f"{collection}/{prefix}{ours}/{leaf}", int(found.group(1)) if found.lastindex == 2 else None
    raise AssertionError(f"{name}: no variable of ours")


def _stem_place(inner: str) -> str:
    if inner == "conv1.weight":
        return "params/stem_conv/kernel"
    collection, leaf = LEAVES[inner.removeprefix("bn1.")]
    return f"{collection}/stem_norm/{leaf}"


class Variables:
    """Conversion between arrays by PyTorch's names and our tree, for one network.

    Args:
      shapes: shapes of our variables, flat, by path.
      head: number of the head's feature, or None in a block.
    """

    def __init__(self, shapes: Mapping[str, Any], head: int | None = None):
        self.shapes, self.head = shapes, head

    def to_ours(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Flat variables by our paths; every entry has to come from the arrays."""
        flat = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in self.shapes.items()}
        for name, array in arrays.items():
            place = place_of(name, head=self.head)
            if place is None or place[0] not in flat:
                continue
            path, branch = place
            flat[path][... if branch is None else branch] = self._in_our_layout(path, array)
        missing = [path for path, value in flat.items() if np.isnan(value).any()]
        assert not missing, f"no values for {missing[:5]}"
        return flat

    def _in_our_layout(self, path: str, array: np.ndarray) -> np.ndarray:
        if not path.endswith("/kernel"):
            return array
        if array.ndim == 2 and array.shape[1] == 1:
            # One long column in the order of (O, I, H, W).
            height, width, inputs, outputs = self.shapes[path].shape
            array = array.reshape(outputs, inputs, height, width)
        return pytorch.convert_layout(array, to="ours")

    def by_name(self, flat: Mapping[str, Any], reference: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Our values by PyTorch's names and in its shapes, for all names of ``reference`` we have."""
        found = {}
        for name, array in reference.items():
            place = place_of(name, head=self.head)
            if place is None or place[0] not in flat:
                continue
            path, branch = place
            value = np.asarray(flat[path])[... if branch is None else branch]
            if path.endswith("/kernel"):
                value = pytorch.convert_layout(value, to="pytorch")
            found[name] = value.reshape(array.shape)
        return found


def quant_spec(bits: int, *, quantize_weights: bool = True) -> QuantSpec:
    """The released quantizers; the first phase leaves the weights real."""
    weight = {"weight": spec("lsq", bits=bits)} if quantize_weights else {}
    return QuantSpec(**weight, act=spec("lsq", bits=bits), searched=spec("branch_clip", bits=bits))


def tiny_network(rows: np.ndarray, *, head_width: int, num_classes: int, quant: QuantSpec) -> tuple[Any, int]:
    """The network of a file's geometry (row 0 is the stem), without dropout, and the number of the head's feature."""
    (_, stem_width, _, stem_stride), *blocks = (tuple(int(v) for v in row) for row in rows)
    choice = spec(
        "basq_mobilenet_v2",
        rows=tuple(blocks),
        head_width=head_width,
        stem_width=stem_width,
        stem_stride=stem_stride,
        dropout=0.0,
    )
    return networks.build(choice, quant, num_classes=num_classes), 1 + sum(row[2] for row in blocks)
