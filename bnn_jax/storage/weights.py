"""The weights in use: what the weight quantizers of a network make of its variables, layer by layer."""

import contextlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import files
from bnn_jax.layers.conv import QuantConv, QuantDense
from bnn_jax.quantizers.base import Encoded, WeightQuantizer, evaluation_context

PARTS = ("kernel", "indices", "levels", "scale")
# Of a layer: its path, its quantizer, what that was called with, the kernel in use.
Visit = Callable[[str, WeightQuantizer, tuple, jax.Array], None]


def encoded_weights(
    network: nn.Module, variables: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> dict[str, Encoded]:
    """Look-up form of the weights of every layer that has one: indices, levels, scale.

    The network is traced, not run: only the weights are computed with.

    Args:
      network: (images, QuantContext) -> NetworkOutput.
      variables: trained variables of the network (params, batch_stats, quant_state, knobs).
      image_shape: (H, W, C) of the images it reads.

    Returns:
      By path of the layer ('layer1_0/conv1'), in the order of the calls, without layers of real-valued weights.
    """
    found: dict[str, Encoded] = {}

    def visit(layer: str, quantizer: WeightQuantizer, args: tuple, _: jax.Array) -> None:
        with jax.ensure_compile_time_eval():
            encoded = quantizer.encode(*args)
        if encoded is not None:
            found[layer] = encoded

    ctx = evaluation_context(variables)
    # The variables are constants of the traced function, so that they can be computed with while the images cannot.
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with _visited_layers(visit):
        jax.eval_shape(lambda images: network.apply(variables, images, ctx), images)
    return found


def weight_signs(
    network: nn.Module, variables: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> dict[str, jax.Array]:
    """Signs of the weights in use of every quantized layer, int8 of the kernel's shape, by path; to be jitted.

    Args:
      network: (images, QuantContext) -> NetworkOutput.
      variables: variables of the network.
      image_shape: (H, W, C) of the images it reads.
    """
    found: dict[str, jax.Array] = {}

    def visit(layer: str, quantizer: WeightQuantizer, _: tuple, kernel: jax.Array) -> None:
        if quantizer.cost(kernel.shape).stored_bits < 32:
            found[layer] = jnp.sign(kernel).astype(jnp.int8)

    with _visited_layers(visit):
        # Inside jit, what the signs do not depend on is never computed.
        network.apply(variables, jnp.zeros((1, *image_shape)), evaluation_context(variables))
    return found


def _visited_layers(visit: Visit) -> contextlib.AbstractContextManager:
    """While it is open, every layer's weights are shown to ``visit``."""

    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module: Any = context.module
        kernel = next_function(*args, **kwargs)
        # The quantizer a layer owns, not one inside another quantizer.
        of_layer = isinstance(module, WeightQuantizer) and isinstance(module.parent, (QuantConv, QuantDense))
        if of_layer and context.method_name == "__call__":
            visit("/".join(module.path[:-1]), module, args, kernel)
        return kernel

    return nn.intercept_methods(interceptor)


def save_weights(path: Path, encoded: Mapping[str, Encoded]) -> None:
    """Writes the weights in use to a compressed ``.npz``, in one step: the old file or the whole new one.

    For each layer: ``LAYER/kernel`` (kh, kw, I, O) or (I, O), float32, the weights as they are multiplied; and
    ``LAYER/indices``, ``LAYER/levels``, ``LAYER/scale``, of which they are looked up. Latent weights (logits) are in
    the checkpoints.

    Args:
      path: file to write.
      encoded: by path of the layer.
    """
    arrays = {}
    for layer, weights in encoded.items():
        parts = (weights.decode(), weights.indices, weights.levels, weights.scale)
        arrays.update({f"{layer}/{name}": np.asarray(value) for name, value in zip(PARTS, parts, strict=True)})
    with files.replacing(path, binary=True) as file:
        np.savez_compressed(file, **arrays)


def is_sound(path: Path) -> bool:
    """Whether a file is there that ``save_weights`` wrote: all checksums are right, no array of a layer is missing."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {tuple(name.rsplit("/", 1)) for name in archive.namelist()}
            layers = {layer for layer, *_ in names}
            complete = names == {(layer, f"{part}.npy") for layer in layers for part in PARTS}
            return bool(names) and complete and archive.testzip() is None
    except Exception:  # Whatever a damaged file makes zipfile and zlib raise.
        return False


def put_base(variables: dict[str, Any], fresh: dict[str, Any], encoded: Mapping[str, Encoded]) -> dict[str, Any]:
    """Variables in which the weights in use of another network are the fixed weights of the layers that have some.

    Args:
      variables: of the network, with fixed weights in 'quant_state/LAYER/weight_quantizer/base'.
      fresh: its variables before anything was copied: latent weights of these layers are taken from here.
      encoded: the other network's weights, by path of the layer.

    Raises:
      ValueError: a layer with fixed weights that the other network has no encoded weights for, or of another shape.
    """
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(variables, sep="/")
    flat_fresh: dict[str, Any] = flax.traverse_util.flatten_dict(fresh, sep="/")
    for path, ones in flat_fresh.items():
        if not (path.startswith("quant_state/") and path.endswith("/weight_quantizer/base")):
            continue
        layer = path.removeprefix("quant_state/").removesuffix("/weight_quantizer/base")
        kernel = encoded[layer].decode() if layer in encoded else None
        if kernel is None or kernel.shape != ones.shape:
            found = "none" if kernel is None else f"shape {kernel.shape}"
            raise ValueError(f"fixed weights of {layer}: {found} where they are taken from, expected {ones.shape}")
        flat[path] = kernel
        flat[f"params/{layer}/kernel"] = flat_fresh[f"params/{layer}/kernel"]
    return flax.traverse_util.unflatten_dict(flat, sep="/")
