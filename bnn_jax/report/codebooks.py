"""What the codebooks of a trained network look like and how its kernels use them, as plain arrays."""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from bnn_jax.ops import codebook as ops
from bnn_jax.quantizers.codebook import CodebookWeight
from bnn_jax.report.codebook_plots import CodebookUse

SUFFIX = "/codebook"


def codebook_uses(variables: Mapping[str, Any], initial: Mapping[str, Any]) -> dict[str, CodebookUse]:
    """Codebook and use of every layer that has one.

    Args:
      variables: trained variables of a network.
      initial: the variables its stage began with.

    Returns:
      By path of the layer ('layer1_0/conv'), in natural order; {} for a network without codebooks.
    """
    params, memory = (flat(variables, collection) for collection in ("params", "quant_state"))
    before = flat(initial, "params")
    # A codebook's own path names the quantizer, and the one around it, too.
    layers = {path.partition("/weight_quantizer")[0]: path for path in params if path.endswith(SUFFIX)}
    return {
        layer: _use(params[f"{layer}/kernel"], params[path], memory[_memory_of(path)], before[path])
        for layer, path in sorted(layers.items())
    }


def flat(variables: Mapping[str, Any], collection: str) -> dict[str, Any]:
    """Leaves of a collection by path."""
    return flax.traverse_util.flatten_dict(variables.get(collection, {}), sep="/")


def _memory_of(path: str) -> str:
    return path.removesuffix(SUFFIX) + "/memory"


def _use(kernel: Any, codebook: Any, memory: Any, initial: Any) -> CodebookUse:
    rows = ops.to_rows(jnp.asarray(kernel))
    patterns = ops.remember(jnp.asarray(codebook), jnp.asarray(memory), CodebookWeight.dead_zone)
    return CodebookUse(
        patterns=np.asarray(patterns).astype(int),
        counts=np.bincount(np.asarray(ops.nearest(rows, patterns)), minlength=len(patterns)),
        free_counts=np.bincount(np.asarray(ops.codes(rows)), minlength=ops.PATTERNS),
        codebook=np.asarray(codebook),
        initial=np.where(np.asarray(initial) > 0, 1, -1),
    )
