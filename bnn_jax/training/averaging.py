"""The exponential moving average of the weights over the steps of a stage.

Forward, after step t = 1, 2, ...: ``a_t = a_(t-1) + r_t (w_t - a_(t-1))``, ``r_t = (1 - d) / (1 - d**t)``, d the decay.
That is the mean of w_1 to w_t with weights ``d**(t - i)``, so that the initial weights have no part in it (optax.ema
with ``debias``). Parameters and BatchNorm's running statistics are averaged; states of quantizers and objectives are
those of the last step, and so are parameters that a projection replaces (``Projection.rewrites``).

In the state, ``params`` and ``batch_stats`` hold the average and ``moving`` what the steps change: whatever reads a
network (evaluation, the choice of the best epoch, export, teachers, the next stage, ``--checkpoint``) reads the
average, and a run goes on bit for bit.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bnn_jax.training.optimizer import path_of
from bnn_jax.training.state import TrainState

AVERAGED = ("params", "batch_stats")


def with_average(state: TrainState) -> TrainState:
    """A stage's first state with an average; of its values the first step leaves nothing."""
    # In buffers of their own: the state is donated, and none may be donated twice.
    return state.replace(moving={name: jax.tree.map(jnp.copy, getattr(state, name)) for name in AVERAGED})


def moving(state: TrainState) -> TrainState:
    """The state without the average: as if it had never been taken. A state that has none is handed back."""
    return state.replace(**state.moving, moving={}) if state.moving else state


def averaged(before: TrainState, stepped: TrainState, *, decay: float, not_averaged: Sequence[str] = ()) -> TrainState:
    """The state after a step, with the average.

    Args:
      before: the state before the step, with the average.
      stepped: what the step has made of ``moving(before)``.
      decay: d, 0 < d < 1.
      not_averaged: patterns of parameters that are taken as they are.
    """
    # 1 - d**t of a d near 1 would lose its digits in the first steps.
    rate = (1 - decay) / -jnp.expm1((before.step + 1) * math.log(decay))

    def average(path: Sequence[Any], old: jax.Array, new: jax.Array) -> jax.Array:
        if any(re.search(pattern, path_of(path)) for pattern in not_averaged):
            return new
        # In this form a parameter that stands still keeps its bits.
        return old + rate * (new - old)

    own = {name: getattr(stepped, name) for name in AVERAGED}
    means = {name: jax.tree_util.tree_map_with_path(average, getattr(before, name), own[name]) for name in AVERAGED}
    return stepped.replace(**means, moving=own)
