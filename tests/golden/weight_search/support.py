"""What the weight-search checks share: layouts of logits, names, tolerances."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.quantizers import QuantContext
from bnn_jax.storage import pytorch
from tests.golden.comparison import Comparison

# What the release calls the logits; the candidates are their last axis there.
LOGITS = ".alpha"


def candidates_first(array: np.ndarray) -> jax.Array:
    """(..., K) -> (K, ...)."""
    return jnp.asarray(np.moveaxis(array, -1, 0))


def candidates_last(array: jax.Array) -> np.ndarray:
    """(K, ...) -> (..., K)."""
    return np.moveaxis(np.asarray(array), 0, -1)


def kernel_to_ours(array: np.ndarray) -> jax.Array:
    """(O, I, kh, kw) -> (kh, kw, I, O), (out, in) -> (in, out); others stay."""
    return jnp.asarray(pytorch.convert_layout(array, to="ours"))


def kernel_to_pytorch(array: jax.Array) -> np.ndarray:
    """The inverse of ``kernel_to_ours``."""
    return pytorch.convert_layout(np.asarray(array), to="pytorch")


def logits_to_ours(alpha: np.ndarray) -> jax.Array:
    """(O, I, kh, kw, K) -> (K, kh, kw, I, O), (out, in, K) -> (K, in, out)."""
    return jnp.stack([kernel_to_ours(candidate) for candidate in np.moveaxis(alpha, -1, 0)])


def logits_to_pytorch(logits: jax.Array) -> np.ndarray:
    """The inverse of ``logits_to_ours``."""
    return np.stack([kernel_to_pytorch(candidate) for candidate in logits], axis=-1)


def to_ours(name: str, array: np.ndarray) -> jax.Array:
    """An array of the release in our layout."""
    return logits_to_ours(array) if name.endswith(LOGITS) else kernel_to_ours(array)


def to_pytorch(name: str, array: jax.Array) -> np.ndarray:
    """An array of ours in the layout of the release."""
    return logits_to_pytorch(array) if name.endswith(LOGITS) else kernel_to_pytorch(array)


def our_path(name: str, *, first_layer: int = 1) -> str | None:
    """Our path for a name of the release; None for what we do not keep.

    Args:
      name: 'layer1.0.conv1.alpha', 'bn1.running_mean'.
      first_layer: our number of the release's layer 1 of VGG-Small.
    """
    module, _, leaf = name.rpartition(".")
    if first_layer != 1:
        module = re.sub(r"(?<=^conv)\d+$|(?<=^bn)\d+$", lambda m: str(int(m.group()) - 1 + first_layer), module)
    # Logits are the kernel of their layer; scales and biases have one axis.
    is_kernel = leaf == "alpha" or (leaf == "weight" and not re.search(r"(^|\.)bn\d+$|downsample\.1$", module))
    return pytorch.to_path(f"{module}.{'weight' if is_kernel else leaf}", ndim=2 if is_kernel else 1)


def training_context(temperature: Any) -> QuantContext:
    """Context of a training step at a temperature."""
    return QuantContext(train=True, knobs={"temperature": jnp.float32(temperature)})


def values_of(values: np.ndarray) -> tuple[float, ...]:
    """The candidate list of a file."""
    return tuple(map(float, values))


def relative(result: Comparison, what: str, own: Any, reference: np.ndarray, rtol: float) -> None:
    """Compares with a tolerance of ``rtol`` of the array's largest magnitude, as the files' README defines it."""
    result.close(what, own, reference, atol=rtol * float(np.abs(reference).max(initial=0.0)))
