"""What a pytree holds: a table of its leaves, a hash of their bytes, and how two tables differ.

A checkpoint stores the table and the hash of each of its collections. The table tells a checkpoint of another network
from this one before a byte of it is read; the hash tells a damaged one, which Orbax does not do.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LeafTable = dict[str, tuple[str, tuple[int, ...]]]


def is_key(leaf: Any) -> bool:
    """Whether a leaf, concrete or abstract, is a typed random key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_implementation(leaf: Any) -> str:
    """Name of the generator behind a typed key, concrete or abstract: 'threefry2x32', 'rbg', ..."""
    names: list[str] = []
    # jax.random.key_impl reads arrays only; under eval_shape an abstract key is one.
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), leaf)
    return names[0]


def paths_and_leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields ('name/layer1/kernel', leaf) in the order of the tree; a tree that is one leaf yields (name, leaf)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(part for part in (name, jax.tree_util.keystr(path, simple=True, separator="/")) if part), leaf


def leaf_table(name: str, tree: Any) -> LeafTable:
    """Type and shape of every leaf of a pytree of arrays, concrete or abstract, by path.

    Args:
      name: first part of every path.
      tree: pytree whose leaves have a shape and a dtype.
    """
    return {path: (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in paths_and_leaves(name, tree)}


def check_storable(name: str, tree: Any) -> None:
    """Checks that every leaf comes back from a checkpoint just as it is.

    Raises:
      ValueError: a leaf is no array, has no elements (Orbax refuses it), or has a type that jax would narrow.
    """
    for path, leaf in paths_and_leaves(name, tree):
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise ValueError(f"{path}: {type(leaf).__name__}: only arrays are saved")
        if math.prod(leaf.shape) == 0:
            raise ValueError(f"{path}: shape {leaf.shape}: arrays without elements cannot be saved")
        if not is_key(leaf) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise ValueError(
                f"{path}: dtype {leaf.dtype}: jax would restore {jax.dtypes.canonicalize_dtype(leaf.dtype)}"
            )


def copy_to_host(tree: Any) -> Any:
    """Copies every leaf to numpy arrays of its own; typed keys become their uint32 data.

    On CPU a plain conversion would be a view of the device buffer, which the next training step may reuse (donation)
    while the copy is still being written.
    """
    arrays = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), arrays)


def host_like(tree: Any) -> Any:
    """Uninitialised numpy arrays of the types and shapes that ``copy_to_host`` gives for such a tree."""

    def empty(leaf: Any) -> np.ndarray:
        stored = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        return np.empty(stored.shape, stored.dtype)

    return jax.tree.map(empty, tree)


def content_hash(table: LeafTable, host_tree: Any) -> str:
    """SHA-256 over path, type, shape and bytes of every leaf.

    Args:
      table: ``leaf_table`` of the tree.
      host_tree: what ``copy_to_host`` made of the tree, with the same order of leaves.

    Raises:
      ValueError: table and tree have different numbers of leaves.
    """
    digest = hashlib.sha256()
    rows = zip(table.items(), jax.tree.leaves(host_tree), strict=True)
    for (path, (dtype, shape)), leaf in sorted(rows, key=lambda row: row[0][0]):
        # The stored array's own type and shape are hashed too: those of a key's data are not the key's.
        digest.update(repr((path, dtype, shape, str(leaf.dtype), leaf.shape)).encode())
        # numpy gives no buffer of bfloat16 and other added types, hence the view as bytes.
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def differences(saved: LeafTable, wanted: LeafTable) -> list[str]:
    """One phrase per path at which a saved and a wanted table differ, in the order of the wanted one."""

    def show(row: tuple[str, tuple[int, ...]]) -> str:
        return f"{row[0]} {row[1]}"

    phrases = []
    for path, row in wanted.items():
        if path not in saved:
            phrases.append(f"{path} {show(row)} is missing in it")
        elif saved[path] != row:
            phrases.append(f"{path} is {show(saved[path])} in it and {show(row)} here")
    phrases += [f"{path} {show(row)} is only in it" for path, row in saved.items() if path not in wanted]
    return phrases
