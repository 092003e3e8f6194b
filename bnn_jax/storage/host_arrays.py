"""Arrays on devices as numpy arrays and back; typed random keys as their data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def copy_to_host(tree: Any) -> Any:
    """Copies every leaf to numpy arrays of its own; typed keys become their uint32 data.

    On CPU a plain conversion would be a view of the device buffer, which the next training step may reuse (donation)
    while the copy is still being written.
    """
    arrays = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), arrays)


def host_like(tree: Any) -> Any:
    """Uninitialised numpy arrays of the types and shapes that ``copy_to_host`` gives for such a tree."""

    def empty(leaf: Any) -> np.ndarray:
        stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        return np.empty(stored.shape, stored.dtype)

    return jax.tree.map(empty, tree)


def to_devices(host_tree: Any, target: Any) -> Any:
    """Puts numpy arrays where the target's arrays are, in buffers that nothing else refers to.

    Args:
      host_tree: the restored arrays.
      target: concrete or abstract arrays.
    """

    def put(leaf: jax.Array | jax.ShapeDtypeStruct, value: Any) -> jax.Array:
        # An array that was never assigned to devices must stay free to move to those of the others.
        sharding = leaf.sharding if getattr(leaf, "committed", True) else None
        if sharding is not None and not sharding.is_fully_addressable:
            # Devices of other processes: device_put refuses them, and each process has the same values.
            array = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
        else:
            # jnp.array copies; device_put alone may keep the numpy memory, and one and the same for all devices.
            array = jnp.array(value) if sharding is None else jax.device_put(jnp.array(value), sharding)
        if _is_key(leaf):
            return jax.random.wrap_key_data(array, impl=_key_implementation(leaf))
        return array

    return jax.tree.map(put, target, host_tree)


def _is_key(leaf: Any) -> bool:
    """Whether a leaf, concrete or abstract, is a typed random key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_implementation(leaf: Any) -> str:
    """Name of the generator behind a typed key, concrete or abstract: 'threefry2x32', 'rbg', ..."""
    names: list[str] = []
    # jax.random.key_impl reads arrays only; under eval_shape an abstract key is one.
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), leaf)
    return names[0]
