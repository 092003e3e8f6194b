"""Placement on devices: one mesh axis ``data``; batches are split over it, everything else is replicated."""

import dataclasses
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
        """Copies a pytree to all devices, into new buffers."""
        return jax.device_put(tree, self.replicated)

    def pad_rows(self, indices: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pads the last axis of an index plan to a multiple of the number of devices, with masked rows."""
        missing = -indices.shape[-1] % self.count
        widths = [(0, 0)] * (indices.ndim - 1) + [(0, missing)]
        return np.pad(indices, widths), np.pad(mask, widths)


def all_devices() -> Devices:
    """The mesh over every device jax sees."""
    # Auto: with Explicit axes, the default, jax 0.11 and 0.12 refuse the scatter in the gradient of a cross-entropy.
    return Devices(jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)))
