"""Several seeds of a stage in one program: whatever differs between them has a first axis, over which ``vmap`` goes.

State, variables and a teacher that was trained for each seed are stacked, (N, ...); index plans are (steps, N, batch);
images, schedules and a teacher that all share are not. Seed i computes what a run of that seed alone computes, within
rounding: XLA turns N convolutions with weights of their own into one, which adds in another order.

With one seed every function here hands back what it was given, so nothing changes. What is written for one seed goes
through a ``Seeds`` wherever several differ; nothing else knows how many there are.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.data.order import index_plan


@dataclasses.dataclass(frozen=True)
class Seeds:
    """The seeds a stage is trained with, side by side.

    Attributes:
      names: seed of the run that each one stands for, for records and messages.
      orders: its seed of the order of the images in this stage.
      initials: its seed of the initial variables in this stage.
      own_teachers: whether each has a teacher of its own, so that the teacher's variables are stacked.
    """

    names: tuple[int, ...]
    orders: tuple[int, ...]
    initials: tuple[int, ...]
    own_teachers: bool = False

    @property
    def count(self) -> int:
        """N."""
        return len(self.names)

    def index_plan(self, epoch: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """``data.order.index_plan`` of every seed: indices int32 and mask bool, (steps, batch) or (steps, N, batch).

        Args:
          epoch: number of the epoch, from 0.
          **options: of ``data.order.index_plan``.
        """
        if self.count == 1:
            return index_plan(self.orders[0], epoch, **options)
        plans = [index_plan(order, epoch, **options) for order in self.orders]
        return np.stack([indices for indices, _ in plans], axis=1), np.stack([mask for _, mask in plans], axis=1)

    def over(self, function: Callable, *, in_axes: Any = 0) -> Callable:
        """``function`` of one seed for all at once.

        Args:
          function: of one seed.
          in_axes: as for ``jax.vmap``: 0 for arguments of each seed, None for those they share.
        """
        return function if self.count == 1 else jax.vmap(function, in_axes=in_axes)

    def stack(self, each: Sequence[Any]) -> Any:
        """One pytree of those of all seeds, in new buffers: every leaf gets a first axis of length N."""
        return each[0] if self.count == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def shapes(self, tree: Any) -> Any:
        """What ``stack`` makes of such shapes."""
        if self.count == 1:
            return tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.count, *leaf.shape), leaf.dtype), tree)

    def unstack(self, tree: Any) -> list[Any]:
        """The part of each seed."""
        if self.count == 1:
            return [tree]
        return [jax.tree.map(lambda leaf: leaf[index], tree) for index in range(self.count)]  # noqa: B023 - used at once

    def summary(self, each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a record says of all seeds: for every float its mean, and as NAME_sd its standard deviation (n - 1).

        ``seeds`` lists the values of each. Values that are no floats are the same for all. Of one seed, its values.

        Args:
          each: values by name, of each seed.
        """
        if self.count == 1:
            return dict(each[0])
        found: dict[str, Any] = {}
        for name, first in each[0].items():
            values = [row[name] for row in each]
            found[name] = float(np.mean(values)) if isinstance(first, float) else first
            if isinstance(first, float):
                found[f"{name}_sd"] = float(np.std(values, ddof=1))
        return {**found, "seeds": [{"seed": name, **row} for name, row in zip(self.names, each, strict=True)]}

    def owner(self, finite: np.ndarray) -> str:
        """' of seed 4' for the first seed whose flag is False; '' where there is one seed only.

        Args:
          finite: bool (..., N), or of any shape with one seed.
        """
        if self.count == 1:
            return ""
        return f" of seed {self.names[int(np.argwhere(~finite)[0][-1])]}"


def one_seed(seed: int) -> Seeds:
    """A stage with the seed ``seed`` and no other."""
    return Seeds(names=(seed,), orders=(seed,), initials=(seed,))


# One seed, whichever it is: for programs that do not ask.
ONE_SEED = one_seed(0)


def table_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without lists: the values of seed 4 become 'seed_4/test_top1' and so on."""
    row = {name: value for name, value in record.items() if name != "seeds"}
    for values in record.get("seeds", ()):
        row.update({f"seed_{values['seed']}/{name}": value for name, value in values.items() if name != "seed"})
    return row
