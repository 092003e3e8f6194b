"""Placement on devices: one mesh axis ``data``; batches are split over it, everything else is replicated.

The mesh spans the devices of all processes. Values that every process has in full (index plans, variables, images held
in memory) are placed by ``replicate`` and ``split``; images of which each process reads its part, by ``split_local``.
"""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Devices:
    """The mesh and the three placements in use.

    Attributes:
      mesh: one axis, 'data', over all devices of all processes.
    """

    mesh: Mesh

    @property
    def replicated(self) -> NamedSharding:
        """A full copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """First axis split over the devices."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def stacked_rows(self) -> NamedSharding:
        """Second axis split over the devices: (steps, batch)."""
        return NamedSharding(self.mesh, PartitionSpec(None, "data"))

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.mesh.size

    def replicate(self, tree: Any) -> Any:
        """Copies a pytree to all devices, into new buffers; with several processes each must have the same values."""
        if jax.process_count() == 1:
            return jax.device_put(tree, self.replicated)
        return jax.tree.map(lambda leaf: self._put(leaf, self.replicated), tree)

    def split(self, array: np.ndarray, sharding: NamedSharding) -> Any:
        """An array that every process has in full, for a program whose argument is split by ``sharding``."""
        # One process hands NumPy arrays to the program as they are: placing them here costs more time.
        return array if jax.process_count() == 1 else self._put(array, sharding)

    def own_columns(self, width: int) -> slice:
        """Which of ``width`` rows of a batch, a multiple of the number of devices, lie on this process's devices."""
        parts = [index[0] for index in self.rows.addressable_devices_indices_map((width,)).values() if index]
        bounds = sorted({part.indices(width)[:2] for part in parts})
        if any(end != start for (_, end), (start, _) in itertools.pairwise(bounds)):
            raise ValueError(f"the devices of process {jax.process_index()} do not lie side by side in the mesh")
        return slice(bounds[0][0], bounds[-1][1])

    def split_local(self, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        """An array split by ``sharding`` of which this process has its own rows, those of ``own_columns``."""
        return jax.make_array_from_process_local_data(sharding, array)

    def _put(self, leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda value: value, out_shardings=sharding)(leaf)
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self._put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    def pad_rows(self, indices: np.ndarray, mask: np.ndarray, *, parts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Pads the last axis of an index plan to a multiple of ``parts`` times the devices, with masked rows."""
        missing = -indices.shape[-1] % (self.count * parts)
        widths = [(0, 0)] * (indices.ndim - 1) + [(0, missing)]
        return np.pad(indices, widths), np.pad(mask, widths)


def all_devices() -> Devices:
    """The mesh over every device jax sees."""
    # Auto: with Explicit axes, the default, jax 0.11 and 0.12 refuse the scatter in the gradient of a cross-entropy.
    return Devices(jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)))


def describe_devices() -> str:
    """'8 x NVIDIA H200 (gpu)': what jax computes on."""
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform})"
