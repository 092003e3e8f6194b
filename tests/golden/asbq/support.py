"""What the ASBQ checks share: layouts, the released quantizers, PyTorch's names, networks of a state's depth."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnn_jax import networks, objectives
from bnn_jax.data.augment import prepare_eval
from bnn_jax.data.tfds import TFDS_SETS
from bnn_jax.stages import IDENTITY, QuantSpec, Spec, spec
from bnn_jax.storage import pytorch

PRUNED_SHARE = 0.05


def nhwc(array: np.ndarray) -> jax.Array:
    """(N, C, H, W) -> (N, H, W, C)."""
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def nchw(array: jax.Array) -> np.ndarray:
    """(N, H, W, C) -> (N, C, H, W)."""
    return np.asarray(array).transpose(0, 3, 1, 2)


def to_ours(array: np.ndarray) -> jax.Array:
    """Kernel in our layout."""
    return jnp.asarray(pytorch.convert_layout(array, to="ours"))


def to_pytorch(array: jax.Array) -> np.ndarray:
    """Kernel in PyTorch's layout."""
    return pytorch.convert_layout(np.asarray(array), to="pytorch")


def normalised(images: np.ndarray) -> jax.Array:
    """uint8 images (N, H, W, C) as the network sees them, with the constants of CIFAR-10."""
    return prepare_eval(jnp.asarray(images), mean=TFDS_SETS["cifar10"].mean, std=TFDS_SETS["cifar10"].std)


def weight_spec(bits: int, *, masked: bool, pattern: str = "filter") -> Spec:
    """The released weight quantizer: several levels at 1 bit; the mask acts before it."""
    weight = IDENTITY if bits == 32 else spec("dorefa", bits=bits, **({"one_bit": "levels"} if bits == 1 else {}))
    if not masked:
        return weight
    return spec("pruned", inner=weight, amount=PRUNED_SHARE, pattern=pattern, apply_mask="before")


def act_spec(bits: int) -> Spec:
    """The released activation quantizer."""
    return IDENTITY if bits == 32 else spec("dorefa", bits=bits)


def quant_spec(bits: int, *, plain: bool = False) -> QuantSpec:
    """Quantizers of a released network; a plain one (VGG-Small) quantizes its first convolution too, prunes blocks."""
    weight = weight_spec(bits, masked=True, pattern="row_block" if plain else "filter")
    return QuantSpec(weight=weight, act=act_spec(bits), first=weight if plain else IDENTITY)


def full_masks(keep: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Masks by PyTorch's names from 0/1 per output filter; no entries mean that all filters are kept.

    Args:
      keep: by layer ('layer1.0.conv1').
      state: has the layers' ``weight_orig``.
    """
    masks = {}
    for layer, kept in keep.items():
        shape = state[f"{layer}.weight_orig"].shape
        filters = kept if kept.size else np.ones(shape[0], np.uint8)
        masks[f"{layer}.weight_mask"] = np.broadcast_to(filters[:, None, None, None], shape)
    return masks


def bit_widths(names: Iterable[str], pattern: str) -> list[int]:
    """The numbers that ``pattern`` captures at the beginning of the names, rising."""
    return sorted({int(match.group(1)) for match in (re.match(pattern, name) for name in names) if match})


@functools.partial(jax.jit, static_argnums=0)
def value_and_pullback(function: Callable, arguments: Any, cotangent: jax.Array) -> tuple[jax.Array, Any]:
    """``function(*arguments)`` and the gradients of its product with the cotangent."""
    value, pullback = jax.vjp(function, *arguments)
    return value, pullback(cotangent)


def loss_terms(*, weight: float, temperature: float, reduction: str) -> tuple[objectives.Objective, ...]:
    """(1 - weight) * cross-entropy and weight * 2 T^2 * distillation, both logged even where their factor is 0."""
    factor = weight * 2 * temperature**2
    return (
        objectives.build(spec("cross_entropy", weight=1 - weight)),
        objectives.build(spec("distillation", weight=factor, temperature=temperature, reduction=reduction)),
    )


def gradient_tolerance(reference: np.ndarray) -> float:
    """2e-4 absolute, or 1e-4 of the largest gradient where that is more."""
    return max(2e-4, 1e-4 * float(np.abs(reference).max()))


def in_pytorch_form(variables: Mapping[str, Any], names: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our arrays by PyTorch's names, in its layout; names that are no variable of ours are left out.

    Args:
      variables: collections.
      names: arrays by PyTorch's names; their number of axes tells a kernel from a scale.
    """
    flat, own = flatten_dict(dict(variables), sep="/"), {}
    for name, reference in names.items():
        path = pytorch.to_path(name, ndim=reference.ndim)
        if path in flat:
            own[name] = to_pytorch(flat[path]) if reference.ndim > 1 else np.asarray(flat[path])
    return own


def stage_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Blocks per stage and widths of a ResNet, from the shapes of its parameters by PyTorch's names."""
    matches = [re.fullmatch(r"layer(\d+)\.(\d+)\.conv2\.weight_orig", name) for name in shapes]
    blocks = [(int(match.group(1)), shapes[match.string][0]) for match in matches if match]
    stages = sorted({stage for stage, _ in blocks})
    return {
        "stage_sizes": tuple(sum(other == stage for other, _ in blocks) for stage in stages),
        "widths": tuple(next(width for other, width in blocks if other == stage) for stage in stages),
    }


def resnet(shapes: Mapping[str, tuple[int, ...]], bits: int, *, block: str, name: str = "resnet8") -> Any:
    """A ResNet of the depth, widths and classes of a state; ``name`` gives the stem and what follows the blocks."""
    choice = spec(name, block=block, **stage_options(shapes))
    return networks.build(choice, quant_spec(bits), num_classes=shapes["fc.weight"][0])
