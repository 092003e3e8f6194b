"""What a checkpoint says about its content: for each item a table of its leaves and a hash of their bytes.

The table tells a checkpoint of another network from this one before a byte of it is read; the hash tells a damaged one,
which Orbax does not do.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnn_jax import run_files
from bnn_jax.errors import CheckpointError
from bnn_jax.storage import orbax_files
from bnn_jax.storage.orbax_files import Damage

FORMAT = 2
# Items whose structure tells a network; the others are the optimiser's, the objectives' and the random generator's.
VARIABLES = ("params", "batch_stats", "quant_state", "knobs")

# Path of a leaf to its type and shape: 'params/fc/kernel' to 'float32 (64, 10)'.
LeafTable = dict[str, str]


def leaf_table(name: str, tree: Any) -> LeafTable:
    """Type and shape of every leaf of a pytree of arrays, concrete or abstract, by path, in the order of the tree.

    Args:
      name: first part of every path.
      tree: pytree whose leaves have a shape and a dtype.
    """
    table = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # A tree that is one leaf has an empty path.
        parts = (name, jax.tree_util.keystr(path, simple=True, separator="/"))
        table["/".join(filter(None, parts))] = f"{leaf.dtype} {tuple(leaf.shape)}"
    return table


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
    for row, leaf in sorted(rows, key=lambda row: row[0]):
        # The stored array's own type and shape are hashed too: those of a key's data are not the key's.
        digest.update(repr((*row, str(leaf.dtype), leaf.shape)).encode())
        # numpy gives no buffer of bfloat16 and other added types, hence the view as bytes.
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Header:
    """The verified content of a step's item ``meta``.

    Attributes:
      step: optimiser steps done.
      meta: what the caller of ``save`` handed over.
      metrics: of the finished epoch, or None in the middle of one.
      tables: leaves of each saved item.
      hashes: content hash of each saved item.
    """

    step: int
    meta: dict[str, Any]
    metrics: dict[str, float] | None
    tables: dict[str, LeafTable]
    hashes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with their own hash."""
        content = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))
        return {**content, "sha256": _json_hash(content)}

    def check_structure(self, folder: Path, tables: Mapping[str, LeafTable]) -> None:
        """Checks that the leaves of some items are the saved ones.

        Raises:
          CheckpointError: they are others; the first differences are named.
        """
        found = {name: _differences(self.tables.get(name, {}), table) for name, table in tables.items()}
        if phrases := [phrase for name in found for phrase in found[name]]:
            other_network = any(found.get(name) for name in VARIABLES)
            what = "network" if other_network else "optimiser, objective or random generator"
            more = f" (and {len(phrases) - 3} more)" if len(phrases) > 3 else ""
            raise CheckpointError(f"{folder}: checkpoint of another {what}: {'; '.join(phrases[:3])}{more}")

    def shapes(self, names: Iterable[str]) -> dict[str, Any]:
        """Abstract arrays of some of the saved items, in nested dictionaries; {} for one that is empty."""
        nested: dict[str, Any] = {name: {} for name in names}
        for name in nested:
            for path, row in self.tables.get(name, {}).items():
                dtype, _, shape = row.partition(" ")
                place = nested
                *parts, last = path.split("/")
                for part in parts:
                    place = place.setdefault(part, {})
                sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
                place[last] = jax.ShapeDtypeStruct(sizes, np.dtype(dtype))
        return nested

    @classmethod
    def read(cls, folder: Path) -> "Header":
        """Reads and verifies what ``to_json`` wrote.

        Raises:
          Damage: it cannot be read, does not have its hash, or is of another step or format.
        """
        value = orbax_files.read_meta(folder)
        try:
            matches = isinstance(value, dict) and value.pop("sha256", None) == _json_hash(value)
        except RecursionError:
            matches = False
        if not matches:
            raise Damage("meta does not match its hash")
        if value.pop("format", None) != FORMAT:
            raise Damage("meta is of another version of this program")
        if wrong := run_files.problem(value, run_files.HEADER):
            raise Damage(f"meta: {wrong}")
        metrics = value.get("metrics")
        header = cls(value["step"], value["meta"], metrics, value["tables"], value["hashes"])
        if str(header.step) != folder.name:
            raise Damage(f"it is a copy of step {header.step}")
        return header


def _json_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(saved: LeafTable, wanted: LeafTable) -> list[str]:
    """One phrase per path at which a saved and a wanted table differ, in the order of the wanted one."""
    phrases = []
    for path, row in wanted.items():
        if path not in saved:
            phrases.append(f"{path} {row} is missing in it")
        elif saved[path] != row:
            phrases.append(f"{path} is {saved[path]} in it and {row} here")
    return phrases + [f"{path} {row} is only in it" for path, row in saved.items() if path not in wanted]
